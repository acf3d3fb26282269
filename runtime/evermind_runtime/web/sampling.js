// Choosing the next token as the Python runtime does: plain temperature number for number, and the
// knobs of `warping.py` in the same order, but for a softmax's last bit at a boundary.

/** The 32-bit generator of uniforms in [0, 1); a seed of 0 is the same stream as 1. */
class Lcg {
  #state;

  constructor(seed) {
    this.#state = seed >>> 0 || 1;
  }

  next() {
    this.#state = (Math.imul(1664525, this.#state) + 1013904223) >>> 0;
    return this.#state / 4294967296;
  }
}

/**
 * Greedy (`temperature` 0 or less), or one uniform a token; `topK` 0, `topP` 1, `minP` 0 and
 * `repetitionPenalty` 1 change nothing.
 */
export class Sampler {
  #knobs;
  #lcg;
  #seen = new Set();

  constructor(knobs, seed = 1) {
    this.#knobs = knobs;
    this.#lcg = new Lcg(seed);
  }

  /** Tokens that the repetition penalty counts; those that are picked it counts anyway. */
  see(tokens) {
    if (this.#knobs.repetitionPenalty !== 1) for (const token of tokens) this.#seen.add(token);
  }

  /** The next token id for one row of logits. */
  pick(logits) {
    const { repetitionPenalty, temperature, topK, topP, minP } = this.#knobs;
    if (this.#seen.size) logits = penalised(logits, this.#seen, repetitionPenalty);
    let choice;
    if (temperature <= 0) choice = greedy(logits);
    else if (!topK && topP >= 1 && !minP) choice = this.#drawn(logits, temperature);
    else {
      const scores = warped(logits, this.#knobs);
      const kept = [...scores.keys()].filter((index) => scores[index] > -Infinity);
      // Nothing is left where logits are NaN.
      choice = kept.length
        ? kept[
            this.#drawn(
              kept.map((index) => scores[index]),
              1,
            )
          ]
        : greedy(logits);
    }
    this.see([choice]);
    return choice;
  }

  #drawn(logits, temperature) {
    let most = -Infinity;
    for (const logit of logits) most = Math.max(most, logit / temperature);
    // Sums and differences one by one, in order, as rounding decides on the boundary.
    const weights = Float32Array.from(logits, (one) => Math.exp(one / temperature - most));
    let total = 0;
    for (const weight of weights) total += weight;
    let left = this.#lcg.next() * total;
    for (let index = 0; index < weights.length; index++) {
      left -= weights[index];
      if (left <= 0) return index;
    }
    return weights.length - 1;
  }
}

/** Logits of the ids in `seen` divided by `penalty`, or multiplied where they are negative. */
function penalised(logits, seen, penalty) {
  const scores = Float32Array.from(logits);
  const by = Math.fround(penalty);
  for (const id of seen)
    if (id < scores.length) scores[id] = scores[id] < 0 ? scores[id] * by : scores[id] / by;
  return scores;
}

/** The scores to draw from, in float32: logits over the temperature, -Infinity for what is left out. */
function warped(logits, { temperature, topK, topP, minP }) {
  const by = Math.fround(temperature);
  let scores = Float32Array.from(logits, (one) => one / by);
  if (topK && topK < scores.length) {
    const least = Float32Array.from(scores).sort()[scores.length - topK];
    scores = scores.map((one) => (one < least ? -Infinity : one));
  }
  if (topP < 1) scores = keptTopP(scores, topP);
  if (!minP) return scores;
  const shares = softmax(scores);
  const least = Math.fround(Math.fround(minP) * shares.reduce((a, b) => Math.max(a, b)));
  return scores.map((one, index) => (shares[index] >= least ? one : -Infinity));
}

/** The fewest of the largest whose probabilities reach `p`; at least one. */
function keptTopP(scores, p) {
  const shares = softmax(scores);
  const bound = Math.fround(1 - p);
  // What is so small that all of its like together stay below the bound need not be sorted.
  const small = Math.fround(bound / scores.length);
  let reached = 0;
  const rest = [];
  shares.forEach((share, index) => (share <= small ? (reached += share) : rest.push(index)));
  if (!rest.length) rest.push(scores.lastIndexOf(scores.reduce((a, b) => Math.max(a, b))));
  rest.sort((a, b) => scores[a] - scores[b] || a - b);
  const last = rest.pop();
  const kept = new Float32Array(scores.length).fill(-Infinity);
  kept[last] = scores[last];
  for (const index of rest) {
    reached += shares[index];
    if (Math.fround(reached) > bound) kept[index] = scores[index];
  }
  return kept;
}

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b));
  const weights = scores.map((one) => Math.exp(Math.fround(one - most)));
  const total = Math.fround(weights.reduce((a, b) => a + b));
  return weights.map((one) => one / total);
}

/** The largest logit's id, the lowest among equals; NaN never wins, but in position 0 it does. */
export function greedy(logits) {
  let best = 0;
  for (let index = 1; index < logits.length; index++)
    if (logits[index] > logits[best]) best = index;
  return best;
}
