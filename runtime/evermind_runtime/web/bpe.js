// Byte-level BPE from a Hugging Face tokenizer.json: what this project's language models use.

import { ManifestError, UnsupportedError } from "./errors.js";

// The pieces ByteLevel cuts text into, where a tokenizer.json gives no pattern of its own.
const PIECES = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/** Text to ids and back. */
export class BpeCodec {
  #ids;
  #tokens = new Map();
  #ranks = new Map();
  #added = new Map();
  #pattern;
  #wholeFirst;
  #normalise;
  #known = new Map();
  #before;
  #after;

  /** Raises `UnsupportedError`, naming the part, for a tokenizer of another make. */
  constructor(bytes, where) {
    let raw;
    try {
      raw = JSON.parse(new TextDecoder().decode(bytes));
    } catch (error) {
      throw new ManifestError(`${where}: not JSON: ${error.message}`);
    }
    const { model, decoder, normalizer, added_tokens: added } = raw;
    const need = (fits, part) => {
      if (!fits)
        throw new UnsupportedError(`${where}: a browser knows no such ${part}`, {
          hint: "Tokenise elsewhere, and pass token ids.",
        });
    };
    need(model?.type === "BPE" && model.vocab && Array.isArray(model.merges), "model");
    const plain = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"];
    need(plain.every((key) => !model[key]) && !model.byte_fallback, "BPE option");
    need(decoder?.type === "ByteLevel", "decoder");
    need(normalizer == null || normalizer.type === "NFC", "normalizer");
    need(
      (added ?? []).every((one) => !one.lstrip && !one.rstrip && !one.single_word),
      "added token",
    );
    const frame = readFrame(raw.post_processor);
    need(frame, "post_processor");
    [this.#before, this.#after] = frame;
    const pattern = splitPattern(raw.pre_tokenizer);
    need(pattern, "pre_tokenizer");
    try {
      // In JavaScript \s is not quite Unicode's white space.
      const unicode = pattern
        .replaceAll("\\s", "\\p{White_Space}")
        .replaceAll("\\S", "\\P{White_Space}");
      this.#pattern = new RegExp(unicode, "gu");
    } catch {
      need(false, "pattern");
    }
    this.#normalise = normalizer ? (text) => text.normalize("NFC") : (text) => text;
    this.#wholeFirst = model.ignore_merges === true;
    this.#ids = new Map(Object.entries(model.vocab));
    for (const [token, id] of this.#ids) this.#tokens.set(id, toBytes(token));
    model.merges.forEach((merge, rank) => {
      const [left, right] = Array.isArray(merge) ? merge : merge.split(" ");
      this.#ranks.set(`${left} ${right}`, rank);
    });
    for (const { id, content } of added ?? []) {
      this.#added.set(content, id);
      this.#tokens.set(id, new TextEncoder().encode(content));
    }
  }

  /** Token ids of `text`; with `special`, among the tokens that begin and end a text. */
  encode(text, special = true) {
    const ids = special ? [...this.#before] : [];
    for (const part of this.#splitAdded(text)) {
      if (this.#added.has(part)) ids.push(this.#added.get(part));
      else
        for (const piece of pieces(this.#normalise(part), this.#pattern))
          ids.push(...this.#merge(piece));
    }
    return special ? ids.concat(this.#after) : ids;
  }

  /** A fresh incremental decoder; a character split over tokens waits for its end. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: (id) => decoder.decode(this.#tokens.get(id) ?? new Uint8Array(), { stream: true }),
      finish: () => decoder.decode(),
    };
  }

  #splitAdded(text) {
    if (!this.#added.size) return [text];
    const longestFirst = [...this.#added.keys()].sort((a, b) => b.length - a.length);
    const escaped = longestFirst.map((one) => one.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    return text.split(new RegExp(`(${escaped.join("|")})`, "u")).filter(Boolean);
  }

  #merge(piece) {
    const found = this.#known.get(piece);
    if (found) return found;
    const text = fromBytes(new TextEncoder().encode(piece));
    let parts = [...text];
    if (this.#wholeFirst && this.#ids.has(text)) parts = [text];
    while (parts.length > 1) {
      let best = Infinity;
      for (let i = 0; i + 1 < parts.length; i++)
        best = Math.min(best, this.#ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity);
      if (best === Infinity) break;
      const merged = [];
      for (let i = 0; i < parts.length; i++) {
        const pair =
          i + 1 < parts.length && this.#ranks.get(`${parts[i]} ${parts[i + 1]}`) === best;
        merged.push(pair ? parts[i] + parts[++i] : parts[i]);
      }
      parts = merged;
    }
    const ids = parts.filter((part) => this.#ids.has(part)).map((part) => this.#ids.get(part));
    if (this.#known.size > 10000) this.#known.clear();
    this.#known.set(piece, ids);
    return ids;
  }
}

/** The regular expression a pre-tokenizer splits by; null if it is none of those known here. */
function splitPattern(pre) {
  const bytes = (one, regex) =>
    one?.type === "ByteLevel" && !one.add_prefix_space && (one.use_regex ?? true) === regex;
  if (bytes(pre, true)) return PIECES;
  if (pre?.type !== "Sequence") return null;
  const [split, level, ...rest] = pre.pretokenizers ?? [];
  const isolated = split?.type === "Split" && split.behavior === "Isolated" && !split.invert;
  if (!isolated || rest.length || !bytes(level, false)) return null;
  return split.pattern?.Regex ?? null;
}

/** The ids that a post-processor puts before and after a text; null if it is none known here. */
function readFrame(processor) {
  if (!processor || processor.type === "ByteLevel") return [[], []];
  if (processor.type === "Sequence") {
    const frames = (processor.processors ?? []).map(readFrame);
    const framing = frames.filter((one) => one === null || one[0].length || one[1].length);
    return framing.length > 1 ? null : (framing[0] ?? (frames.length ? [[], []] : null));
  }
  if (processor.type !== "TemplateProcessing" || !Array.isArray(processor.single)) return null;
  const parts = processor.single.map((one) =>
    one.Sequence ? null : processor.special_tokens?.[one.SpecialToken?.id]?.ids,
  );
  const at = parts.indexOf(null);
  const fits = parts.every((one) => one === null || (Array.isArray(one) && one.every(Number.isSafeInteger)));
  if (at < 0 || at !== parts.lastIndexOf(null) || !fits) return null;
  return [parts.slice(0, at).flat(), parts.slice(at + 1).flat()];
}

/** What the pattern finds, and what lies between. */
function* pieces(text, pattern) {
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (match.index > end) yield text.slice(end, match.index);
    if (match[0]) yield match[0];
    end = match.index + match[0].length;
  }
  if (end < text.length) yield text.slice(end);
}

// GPT-2's printable stand-ins for bytes: themselves where they print, else from U+0100 on.
const STAND_INS = (() => {
  const prints = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) =>
    String.fromCharCode(prints(byte) ? byte : next++),
  );
})();
const BYTES = new Map(STAND_INS.map((character, byte) => [character, byte]));

const fromBytes = (bytes) => Array.from(bytes, (byte) => STAND_INS[byte]).join("");
const toBytes = (token) => Uint8Array.from([...token].flatMap((one) => BYTES.get(one) ?? []));
