// The peer, driven by the tests: one JSON request a line in, one JSON answer a line out.
// Bytes travel as base64. An error of the peer's becomes {"error": text}.

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import {
  BPETokenizer,
  EvermindLM,
  EvermindModelPackage,
  LimbicModel,
  SharedExpertMoE,
  VideoRVQCodec,
  applyCheckpointDiff,
  diffCheckpoints,
  exportSafetensors,
  importEvermind,
} from "@seanhogg/builderforce-memory-engine";

const MODELS = {
  "shared-expert-moe": SharedExpertMoE,
  "evermind-lm": EvermindLM,
  limbic: LimbicModel,
};

// The peer wants an ArrayBuffer of the data alone; a Buffer may be part of a pool.
function alone({ buffer, byteOffset, byteLength }) {
  if (byteLength === buffer.byteLength) return buffer;
  return buffer.slice(byteOffset, byteOffset + byteLength);
}

const bytes = (text) => alone(Buffer.from(text, "base64"));

const base64 = (data) => Buffer.from(data).toString("base64");
const floats = (arrays) => base64(new Uint8Array(Float32Array.from(arrays.flatMap((a) => [...a])).buffer));

// What the model gives for the request's inputs; float arrays as base64, joined.
function outputs(family, model, inputs) {
  if (family === "shared-expert-moe") {
    const results = inputs.x.map((x) => model.forward(x));
    return {
      y: floats(results.map((result) => result.output)),
      experts: results.map((result) => result.route.experts),
    };
  }
  if (family === "limbic") {
    const results = inputs.x.map((x, row) => model.forward(x, inputs.hidden[row], inputs.state[row]));
    return {
      hidden: floats(results.map((result) => result.hidden)),
      delta: floats(results.map((result) => result.delta)),
      reward: floats([results.map((result) => result.reward)]),
    };
  }
  return {
    logits: floats(model.forward(inputs.tokens).logits),
    greedy: model.generate(inputs.tokens, { maxNewTokens: inputs.steps }),
    sampled: model.generate(inputs.tokens, {
      maxNewTokens: inputs.steps,
      temperature: inputs.temperature,
      seed: inputs.seed,
    }),
  };
}

// Move every parameter off its initial value, biases included; a plain LCG, its own stream.
function perturb(model, seed) {
  let state = seed >>> 0;
  for (const parameter of model.parameters()) {
    for (let i = 0; i < parameter.data.length; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      parameter.data[i] += (state / 4294967296 - 0.5) * 0.6;
    }
  }
}

function packageOf(family, model, meta, media) {
  if (media) return EvermindModelPackage.fromMediaLM(model, new VideoRVQCodec(media), meta);
  return family === "evermind-lm"
    ? EvermindModelPackage.fromLM(model, meta)
    : EvermindModelPackage.fromModel(model, meta);
}

// The model that `hold` loaded.
let held;

const OPERATIONS = {
  // A bare checkpoint we wrote: load it, run it, write it again.
  load({ family, config, checkpoint, fp16, inputs }) {
    const model = new MODELS[family](config);
    model.loadWeights(bytes(checkpoint));
    return {
      checkpoint: base64(model.exportWeights({ fp16 })),
      outputs: outputs(family, model, inputs),
    };
  },

  // What benchmarks/ compares with: logits of the prompt, and a sampled continuation, timed.
  generate({ config, checkpoint, tokens, steps, temperature, seed }) {
    const model = new EvermindLM(config);
    model.loadWeights(bytes(checkpoint));
    const logits = floats(model.forward(tokens).logits);
    const started = performance.now();
    const made = model.generate(tokens, { maxNewTokens: steps, temperature, seed });
    return { logits, tokens: made, milliseconds: performance.now() - started };
  },

  // The same without text in between, for large models: load a file, and keep it for `decode`.
  hold({ config, file }) {
    held = new EvermindLM(config);
    held.loadWeights(alone(readFileSync(file)));
    return {};
  },

  // What nobody holds any more leaves memory, so that what is left can be measured. The first
  // collection ends one that has begun, which keeps what was held then.
  collect() {
    gc();
    gc();
    return {};
  },

  // Logits after each token, with the whole context computed again, as `generate` does.
  decode({ tokens }) {
    return { logits: floats(tokens.map((_, at) => held.forward(tokens.slice(0, at + 1)).logits[at])) };
  },

  // An .evermind file we wrote: parse, validate, load, run, write it again.
  open({ family, blob, inputs }) {
    const parsed = EvermindModelPackage.fromBlob(bytes(blob));
    const verdict = parsed.validate();
    if (!verdict.ok) throw new Error(verdict.errors.join("; "));
    const model = family === "evermind-lm" ? parsed.loadLM() : parsed.loadModel();
    if (parsed.manifest.modality) parsed.loadMediaLM();
    return { blob: base64(parsed.toBlob()), outputs: outputs(family, model, inputs) };
  },

  // A model of the peer's own, in all its forms.
  make({ family, config, seed, inputs, fp16, meta, media }) {
    const model = new MODELS[family](config);
    perturb(model, seed);
    const made = { checkpoint: base64(model.exportWeights({ fp16 })) };
    if (family !== "limbic") {
      made.blob = base64(packageOf(family, model, { ...meta, fp16 }, media).toBlob());
    }
    if (family === "evermind-lm") made.safetensors = base64(exportSafetensors(model, { fp16 }));
    // Outputs are those of the file: half weights, if it is half.
    const stored = new MODELS[family](config);
    stored.loadWeights(bytes(made.checkpoint));
    made.outputs = outputs(family, stored, inputs);
    return made;
  },

  // A safetensors file we wrote.
  import({ data, topK, fp16 }) {
    const model = importEvermind(new Uint8Array(bytes(data)), { topK });
    return { checkpoint: base64(model.exportWeights({ fp16 })) };
  },

  // Deltas both ways between two checkpoints of one configuration.
  delta({ config, base, current, eps }) {
    const model = new EvermindLM(config);
    model.loadWeights(bytes(current));
    const delta = model.exportDelta(bytes(base), { eps });
    const patched = new EvermindLM(config);
    patched.loadDelta(bytes(base), delta);
    const diff = diffCheckpoints(bytes(base), bytes(current));
    return {
      delta: base64(delta),
      patched: base64(patched.exportWeights()),
      diff: base64(diff),
      applied: base64(applyCheckpointDiff(bytes(base), diff)),
    };
  },

  // Ids of each text, and the text of each list of ids, by the peer's tokenizer.
  tokenize({ vocab, merges, texts, lists }) {
    const tokenizer = new BPETokenizer();
    tokenizer.loadFromObjects(vocab, merges);
    return {
      ids: texts.map((text) => tokenizer.encode(text)),
      texts: lists.map((ids) => tokenizer.decode(ids)),
    };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    answer = OPERATIONS[request.op](request);
  } catch (error) {
    answer = { error: String(error) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
