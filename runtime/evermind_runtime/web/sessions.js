// ONNX Runtime: loading it, and making and running sessions.
//
// onnxruntime-web mounts external data in one table for the whole module, so two sessions made
// at once would read each other's weights: whoever uses this makes and runs one at a time.

import { fromTensor } from "./arrays.js";
import { DeviceError, GraphError, InputError, UnsupportedError } from "./errors.js";

const BUILDS = {
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};

/** Raised by `create` when the WebAssembly heap is full; the pager makes room and tries again. */
export class HeapFull extends Error {}

/** Loads the build of ONNX Runtime for `device` from the folder at `url`. */
export async function startOnnxRuntime(url, device, threads) {
  const build = BUILDS[device];
  if (!build) throw new InputError(`device: expected wasm or webgpu, found '${device}'`);
  if (device === "webgpu") await checkAdapter();
  if (threads > 1 && !globalThis.crossOriginIsolated)
    throw new DeviceError(`threads: ${threads} need a page that is cross-origin isolated`, {
      hint: "Serve it with COOP and COEP (evermind-pack serve --isolate), or ask for one thread.",
    });
  const [script, wasm] = build.map((file) => new URL(file, url).href);
  let ort;
  try {
    ort = await import(script);
  } catch (error) {
    throw new DeviceError(`onnxruntime-web could not be loaded from ${script}: ${error.message}`, {
      hint: "Pass `ortUrl`, the address of the dist/ folder of the npm package onnxruntime-web.",
    });
  }
  ort.env.wasm.wasmPaths = { wasm };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

async function checkAdapter() {
  if (await navigator.gpu?.requestAdapter().catch(() => null)) return;
  throw new DeviceError("device: this browser gives no WebGPU adapter", {
    hint: "Use device: 'wasm', or enable WebGPU in the browser.",
  });
}

/** The sessions of one package on one device. */
export class Sessions {
  #ort;
  #providers;

  constructor(ort, device) {
    this.#ort = ort;
    this.#providers = [device];
  }

  get ort() {
    return this.#ort;
  }

  /**
   * A session for `model`; `external` is {location: bytes} of what its initializers lie in.
   * `fold` computes what is constant once, at the price of holding the result.
   */
  async create(path, model, external, { fold }) {
    try {
      return await this.#ort.InferenceSession.create(model, {
        executionProviders: this.#providers,
        graphOptimizationLevel: fold,
        externalData: Object.entries(external).map(([file, data]) => ({ path: file, data })),
        // Repacked weights are a second copy of them.
        extra: { session: { disable_prepacking: "1" } },
      });
    } catch (error) {
      if (/bad_alloc|out of memory|Array buffer allocation/i.test(error.message))
        throw new HeapFull(error.message);
      throw new UnsupportedError(`${path}: ONNX Runtime cannot run this graph: ${error.message}`);
    }
  }

  /** Map of output name to array. */
  async run(path, session, feeds) {
    try {
      const found = await session.run(feeds);
      return new Map(Object.entries(found).map(([name, tensor]) => [name, fromTensor(tensor)]));
    } catch (error) {
      throw new GraphError(`${path}: the graph failed: ${error.message}`);
    }
  }
}
