/** Numbers of a plan's value; i64 is a BigInt64Array, bool an Uint8Array of 0 and 1. */
export type Data =
  Float32Array | Float64Array | BigInt64Array | Int32Array | Uint8Array | Uint16Array;

/** A named array that a package gives. */
export interface NamedArray {
  dtype: "f32" | "f64" | "f16" | "i64" | "i32" | "u8" | "bool";
  shape: number[];
  data: Data;
}

/** What a package takes: numbers of one dimension, or numbers with their shape. */
export type ArrayLike =
  | readonly number[]
  | readonly bigint[]
  | Data
  | { data: readonly number[] | readonly bigint[] | Data; shape: readonly number[] };

export type ExpertId = readonly [layer: number, expert: number];

export interface OpenOptions {
  /** Gives up opening. */
  signal?: AbortSignal;
  /** Hears of every file fetched, read from disk, evicted or found damaged, while the pack lives. */
  onProgress?: (event: ProgressEvent) => void;
  /**
   * The folder with onnxruntime-web's files (its `dist/`). By default the one of the npm package
   * beside this one.
   */
  ortUrl?: string | URL;
  /** `"wasm"` (the CPU, default) or `"webgpu"`. */
  device?: "wasm" | "webgpu";
  /** Of WebAssembly. Default: half the cores, at most 4, if the page is cross-origin isolated; else 1. */
  threads?: number;
  /**
   * The most that resident experts hold, in bytes; at least one step's experts. Default: all of
   * them, a quarter of the device's memory or 1.5 GiB, whichever is least.
   */
  ramBudget?: number;
  /** The most that this origin keeps on disk, in bytes. Default: what the browser gives. */
  diskBudget?: number;
  /** Where fetched files stay between visits. Default `"auto"`: OPFS, else Cache Storage. */
  store?: "auto" | "opfs" | "cache" | "none";
  /** The package's identity, the sha256 of its manifest.json: `sha256-<base64>` or hex. */
  integrity?: string;
  /** When a shard on disk is hashed: at its first use (default), or at every one. */
  verify?: "first" | "always";
}

/**
 * `initiate`, `progress`, `done`: a file (an expert's shard if `layer` is there) is fetched;
 * `cached`: it was on disk; `corrupt`: it was, but damaged, and is fetched again; `evict`: an
 * expert left memory; `store-failed`: something could not be kept; `ready`: the pack is open.
 */
export interface ProgressEvent {
  status:
    "initiate" | "progress" | "done" | "cached" | "corrupt" | "evict" | "store-failed" | "ready";
  file?: string;
  layer?: number;
  expert?: number;
  loaded?: number;
  total?: number;
  reason?: string;
}

export interface ForwardOptions {
  /** Read and moved on; fresh if not given. */
  state?: PackState;
  /** Limits what is computed; an empty list only moves the state. */
  outputs?: readonly string[];
  signal?: AbortSignal;
}

export interface GenerateOptions {
  maxNewTokens?: number;
  /** 0 (greedy) unless the package says otherwise. */
  temperature?: number;
  /** Draws from the K likeliest; 0: from all. */
  topK?: number;
  /** Draws from the likeliest that together reach P. */
  topP?: number;
  /** Draws from those at least P times as likely as the likeliest. */
  minP?: number;
  /** Above 1: tokens of the prompt and what was made since are less likely. */
  repetitionPenalty?: number;
  /** Chooses the stream of random numbers; the same as in Python. */
  seed?: number;
  stopTokens?: readonly number[];
  /** Continues an earlier sequence. */
  state?: PackState;
  signal?: AbortSignal;
}

/** One generated token, the text it completes, and the experts that made it. */
export interface Piece {
  token: number;
  text: string;
  /** Of the last piece, why there are no more: a stop token, as many as asked, a full context. */
  finish: "stop" | "length" | "context" | null;
  routes: { layer: number; experts: number[]; gates: number[] }[];
}

export interface PackInfo {
  name: string;
  version: string;
  family: string;
  /** sha256 of manifest.json. */
  digest: string;
  config: Record<string, unknown>;
  parameters: Record<string, number>;
  card: Record<string, unknown>;
  /** Of all files. */
  bytes: number;
  layers: { layer: number; experts: number; topK: number; expertBytes: number }[];
  inputs: Signature[];
  outputs: Signature[];
  tokenizer: "bytes" | "tokenizers" | null;
  generation: {
    stopTokens: number[];
    bosToken: number | null;
    temperature: number;
    topK: number;
    topP: number;
    minP: number;
    repetitionPenalty: number;
    maxNewTokens: number;
  };
  device: "wasm" | "webgpu";
  threads: number;
  /** Whether the manifest is the last visit's, as nothing answered at its address. */
  offline: boolean;
}

export interface Signature {
  name: string;
  dtype: string;
  shape: (number | string)[];
  limit: number | null;
}

/** Counters since opening; sizes in bytes. */
export interface Stats {
  tokens: number;
  expertHits: number;
  expertMisses: number;
  evictions: number;
  residentExpertBytes: number;
  peakResidentExpertBytes: number;
  ramBudget: number;
  requests: number;
  bytesFetched: number;
  diskReads: number;
  corrupt: number;
  store: "opfs" | "cache" | "none";
  diskBytes: number;
  diskEvictions: number;
  /** Per layer, how many tokens each expert was given. */
  routed: { layer: number; tokens: number[] }[];
}

/**
 * What a sequence carries from call to call. `generate` refuses a prompt that it has no room for;
 * how much it has, `State.room` of Python, is not told.
 */
export interface PackState {
  save(): Promise<Record<string, NamedArray>>;
  restore(arrays: Record<string, NamedArray>): Promise<void>;
  release(): Promise<void>;
}

export class EvermindPack {
  private constructor();
  /** Opens the package at `url`: its folder, or its manifest.json. */
  static open(url: string | URL, options?: OpenOptions): Promise<EvermindPack>;
  readonly info: PackInfo;
  /** Named arrays in, named arrays out, as the plan declares them. */
  forward(
    inputs: Record<string, ArrayLike>,
    options?: ForwardOptions,
  ): Promise<Record<string, NamedArray>>;
  /** Continues a text or token ids; a token is computed when it is asked for. */
  generate(
    prompt: string | readonly number[],
    options?: GenerateOptions,
  ): AsyncGenerator<Piece, void, void>;
  newState(): Promise<PackState>;
  /** Token ids of `text`; with `special` (default), among the tokens that begin and end a text. */
  encode(text: string, options?: { special?: boolean }): Promise<number[]>;
  /** Fetches experts to disk ahead of need. */
  prefetch(experts: readonly ExpertId[], options?: { signal?: AbortSignal }): Promise<void>;
  /** Whether these experts, or without an argument the whole package, are on disk. */
  isCached(experts?: readonly ExpertId[]): Promise<boolean>;
  /** Removes this package from disk. */
  clearCache(): Promise<void>;
  stats(): Promise<Stats>;
  /** Gives back all memory. */
  close(): Promise<void>;
}

/** The base of all errors raised on purpose. An abort is a DOMException called AbortError. */
export class EvermindError extends Error {
  hint?: string;
}
export class ManifestError extends EvermindError {}
export class UnsupportedError extends EvermindError {}
export class IntegrityError extends EvermindError {
  file: string;
  expected: string;
  found: string;
}
export class NetworkError extends EvermindError {
  file: string;
  url?: string;
  status?: number;
}
export class InputError extends EvermindError {}
export class BudgetError extends EvermindError {}
export class GraphError extends EvermindError {}
export class NonFiniteError extends EvermindError {}
export class StoreError extends EvermindError {}
export class DeviceError extends EvermindError {}
export class ClosedError extends EvermindError {}
