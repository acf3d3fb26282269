// Choosing the next token, number for number as the Python runtime does.

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

/** Greedy (`temperature` 0 or less) or temperature sampling, one uniform a token. */
export class Sampler {
  #temperature;
  #lcg;

  constructor(temperature, seed = 1) {
    this.#temperature = temperature;
    this.#lcg = new Lcg(seed);
  }

  /** The next token id for one row of logits. */
  pick(logits) {
    return this.#temperature <= 0 ? greedy(logits) : this.#sampled(logits);
  }

  #sampled(logits) {
    let most = -Infinity;
    for (const logit of logits) most = Math.max(most, logit / this.#temperature);
    // Sums and differences one by one, in order, as rounding decides on the boundary.
    const weights = Float32Array.from(logits, (one) => Math.exp(one / this.#temperature - most));
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

/** The largest logit's id, the lowest among equals; NaN never wins, but in position 0 it does. */
export function greedy(logits) {
  let best = 0;
  for (let index = 1; index < logits.length; index++)
    if (logits[index] > logits[best]) best = index;
  return best;
}
