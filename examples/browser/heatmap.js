// A cell per expert: not here yet, here, and how many tokens it served.

export class Heatmap {
  #cells = new Map();
  #now = [];

  /** `layers` is a pack's `info.layers`. */
  constructor(element, layers) {
    element.replaceChildren(...layers.map((layer) => this.#row(layer)));
  }

  #row({ layer, experts }) {
    const row = document.createElement("div");
    row.className = "row";
    const cells = document.createElement("div");
    cells.className = "cells";
    cells.style.setProperty("--columns", Math.min(experts, 32));
    for (let expert = 0; expert < experts; expert++) {
      const cell = document.createElement("div");
      cell.className = "cell";
      cell.title = `layer ${layer}, expert ${expert}`;
      this.#cells.set(`${layer}/${expert}`, cell);
      cells.append(cell);
    }
    row.append(`L${layer}`, cells);
    return row;
  }

  /** The expert is on this machine. */
  arrived(layer, expert) {
    this.#cells.get(`${layer}/${expert}`)?.classList.add("here");
  }

  /** Colours every expert by the tokens it served (`stats.routed`). */
  heat(routed) {
    const most = Math.max(1, ...routed.flatMap(({ tokens }) => tokens));
    for (const { layer, tokens } of routed)
      tokens.forEach((count, expert) => {
        const cell = this.#cells.get(`${layer}/${expert}`);
        if (!count) return;
        cell.classList.add("here");
        cell.style.setProperty("--heat", Math.sqrt(count / most).toFixed(3));
        cell.title = `layer ${layer}, expert ${expert}: ${count} tokens`;
      });
  }

  /** Rings the experts of one token (`piece.routes`). */
  now(routes) {
    for (const cell of this.#now) cell.classList.remove("now");
    this.#now = routes.flatMap(({ layer, experts }) =>
      experts.map((expert) => this.#cells.get(`${layer}/${expert}`)).filter(Boolean),
    );
    for (const cell of this.#now) cell.classList.add("now");
  }

  /** How many experts served a token. */
  get used() {
    return this.#count((cell) => cell.style.getPropertyValue("--heat"));
  }

  /** How many experts are on this machine. */
  get here() {
    return this.#count((cell) => cell.classList.contains("here"));
  }

  get size() {
    return this.#cells.size;
  }

  #count(test) {
    return [...this.#cells.values()].filter(test).length;
  }
}
