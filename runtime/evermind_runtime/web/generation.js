// The generation loop: prompt in, tokens out, one at a time.

import { InputError } from "./errors.js";
import { Sampler } from "./sampling.js";

/** An async iterator of {token, text, finish, routes}; arguments are checked before the first token. */
export function generate(model, prompt, options, state, signal) {
  const { plan, generation, family } = model.manifest;
  if (!plan.inputs.has("tokens") || !plan.outputs.has("logits"))
    throw new InputError(`a package of family '${family}' does not generate text`, {
      hint: "Use `forward` with named arrays.",
    });
  const limit = options.maxNewTokens ?? generation.maxNewTokens;
  if (!Number.isSafeInteger(limit) || limit < 0)
    throw new InputError(`maxNewTokens: expected 0 or more, found ${limit}`);
  const sampler = new Sampler(readKnobs(options, generation), options.seed ?? 1);
  const begins = state.fresh;
  const ids = encode(model, prompt, begins);
  if (!ids.length && begins && generation.bosToken !== null) ids.push(generation.bosToken);
  const vocabulary = plan.inputs.get("tokens").limit ?? Infinity;
  const bad = ids.find((id) => !Number.isSafeInteger(id) || id < 0 || id >= vocabulary);
  if (bad !== undefined)
    throw new InputError(`prompt: expected token ids from 0 to ${vocabulary - 1}, found ${bad}`);
  sampler.see(ids);
  const stops = new Set(options.stopTokens ?? generation.stopTokens);
  if (limit) checkRoom(ids.length, state);
  return loop(model, ids, limit, sampler, stops, state, signal);
}

const KNOBS = {
  temperature: [-Infinity, Infinity],
  topK: [0, Number.MAX_SAFE_INTEGER],
  topP: [0, 1],
  minP: [0, 1],
  repetitionPenalty: [Number.MIN_VALUE, Number.MAX_VALUE],
};

/** How tokens are chosen: what is not given, the package says. */
function readKnobs(options, generation) {
  const knobs = {};
  for (const [name, [least, most]] of Object.entries(KNOBS)) {
    const value = (knobs[name] = options[name] ?? generation[name]);
    const whole = name !== "topK" || Number.isInteger(value);
    if (typeof value !== "number" || !(value >= least && value <= most) || !whole)
      throw new InputError(`${name}: expected a number from ${least} to ${most}, found ${value}`);
  }
  const idle = ["topK", "topP", "minP"].find((name) => options[name] !== undefined);
  if (idle && knobs.temperature <= 0)
    throw new InputError(`${idle}: has no effect where the most likely token is always taken`, {
      hint: "Give a temperature above 0 as well, such as 1.",
    });
  return knobs;
}

function encode(model, prompt, special) {
  if (typeof prompt !== "string") return Array.from(prompt, Number);
  if (!model.codec)
    throw new InputError("prompt: this package has no tokenizer, so it cannot take text", {
      hint: "Pass an array of token ids.",
    });
  return model.codec.encode(prompt, special);
}

function checkRoom(prompt, state) {
  // An empty prompt starts from a token too.
  const tokens = Math.max(1, prompt);
  if (tokens <= state.room) return;
  const more = state.fresh ? "" : " more";
  throw new InputError(
    `prompt: expected at most ${state.room}${more} tokens, which fill the model's context, ` +
      `found ${tokens}`,
    { hint: "Shorten it, or begin anew with fewer earlier tokens." },
  );
}

async function* loop(model, prompt, limit, sampler, stops, state, signal) {
  // Another may have filled the state since this one was called.
  if (limit) checkRoom(prompt.length, state);
  const text = model.codec?.stream();
  // An empty prompt starts from token 0, which does not stay as context.
  let forget = prompt.length ? null : state.save();
  const pending = prompt.length ? prompt : [0];
  // The last token that is made is never run.
  const most = Math.min(limit, state.room - prompt.length + 1);
  if (limit && pending.length > 1)
    await model.forward({ tokens: pending.slice(0, -1) }, { state, outputs: [], signal });
  let token = pending.at(-1);
  for (let made = 1; made <= most; made++) {
    const { values, routes } = await model.forward(
      { tokens: [token] },
      { state, outputs: ["logits"], signal },
    );
    const { data, shape } = values.get("logits");
    token = sampler.pick(data.subarray(data.length - shape.at(-1)));
    if (forget) state.restore(forget);
    forget = null;
    const full = most === limit ? "length" : "context";
    const finish = stops.has(token) ? "stop" : made === most ? full : null;
    const piece = (text?.push(token) ?? "") + (finish ? (text?.finish() ?? "") : "");
    yield { token, text: piece, finish, routes: routesOfToken(routes.at(-1)) };
    if (finish) return;
  }
}

function routesOfToken(routes) {
  return [...routes].map(([layer, { ids, gates }]) => ({
    layer,
    experts: Array.from(ids.data, Number),
    gates: Array.from(gates.data),
  }));
}
