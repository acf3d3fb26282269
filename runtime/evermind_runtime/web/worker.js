// The worker: it alone owns ONNX Runtime, the pager and the disk. The page talks to it in
// messages {call, method, args}; {abort: call} gives up on one. It answers {call, value} or
// {call, error}, and posts {event} in between.

import { InputError, toWire } from "./errors.js";
import { generate } from "./generation.js";
import { Model } from "./model.js";

const running = new Map(); // call → AbortController
const states = new Map(); // handle → State
const sequences = new Map(); // handle → async iterator
let model = null;
let handles = 0;

const methods = {
  async open({ options }, signal) {
    model = await Model.open(options, (event) => postMessage({ event }), signal);
    return model.describe();
  },
  async forward({ inputs, state, outputs }, signal) {
    const { values } = await model.forward(inputs, { state: stateOf(state), outputs, signal });
    return Object.fromEntries(values);
  },
  async generate({ prompt, options, state }, signal) {
    const iterator = generate(model, prompt, options, stateOf(state) ?? model.newState(), signal);
    return keep(sequences, iterator);
  },
  async next({ handle }) {
    const { done, value } = await sequences.get(handle).next();
    return done ? null : value;
  },
  async end({ handle, begun }) {
    sequences.delete(handle);
    running.delete(begun);
    await model.rest();
  },
  async newState() {
    return keep(states, model.newState());
  },
  async saveState({ state }) {
    return Object.fromEntries(stateOf(state).save());
  },
  async restoreState({ state, arrays }) {
    stateOf(state).restore(new Map(Object.entries(arrays)));
  },
  async releaseState({ state }) {
    states.delete(state);
  },
  async encode({ text, special }) {
    if (!model.codec) throw new InputError("this package has no tokenizer");
    return model.codec.encode(text, special);
  },
  prefetch: ({ pairs }, signal) => model.prefetch(pairs, signal),
  isCached: async ({ pairs }) => model.isCached(pairs),
  clearCache: () => model.clearCache(),
  stats: async () => model.stats(),
  close: () => model.rest(),
};

addEventListener("message", async ({ data: { abort, call, method, args } }) => {
  if (abort !== undefined) return running.get(abort)?.abort();
  const controller = new AbortController();
  running.set(call, controller);
  try {
    postMessage({ call, value: await methods[method](args, controller.signal) });
  } catch (error) {
    postMessage({ call, error: toWire(error) });
  } finally {
    // A sequence lives on after the call that began it, and ends with the same signal.
    if (method !== "generate") running.delete(call);
  }
});

function keep(table, value) {
  table.set(++handles, value);
  return handles;
}

function stateOf(handle) {
  if (handle === undefined) return undefined;
  const state = states.get(handle);
  if (!state) throw new InputError("state: it was released, or belongs to another pack");
  return state;
}
