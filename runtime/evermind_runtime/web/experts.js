// An experts step: tokens grouped by expert, each expert run once, in ascending order.

import { filled } from "./arrays.js";
import { GraphError } from "./errors.js";

/**
 * `y = Σ gates[:, i] · Expert[ids[:, i]](x)`. The order never depends on what is resident, so
 * a run under any budget adds up the same numbers. Where a gate is 0 no expert is needed.
 */
export async function runExperts(engine, step, board, signal) {
  const { pager } = engine;
  const { kind } = engine.manifest.layers.get(step.layer);
  const [x, ids, gates] = [step.x, step.ids, step.gates].map((name) => board.get(name));
  const groups = groupTokens(step, ids, gates, engine.manifest.layers.get(step.layer).experts);
  engine.counts.add(step.layer, groups);
  const order = [...groups.keys()].sort((a, b) => a - b);
  const whole = kind.scope === "sequence";
  const fixed = [...step.inputs].map(([input, value]) => [input, board.get(value)]);
  let y = null;
  let turn = 0;
  for await (const session of pager.stream(step.layer, order, signal)) {
    const chosen = groups.get(order[turn++]);
    const given = ["x", whole ? x : gather(x, chosen)];
    const output = (await session.run([given, ...fixed])).get("y");
    y ??= filled("f32", [x.shape[0], output.shape[1]]);
    scatter(y, output, chosen, whole);
    await engine.breath.take(signal);
  }
  return y ?? filled("f32", [x.shape[0], await outputWidth(engine, kind, x)]);
}

/** Map of expert to {rows, gates}: the tokens that need it. */
function groupTokens(step, ids, gates, experts) {
  const [tokens, topK] = ids.shape;
  const groups = new Map();
  for (let row = 0; row < tokens; row++) {
    const seen = new Set();
    for (let i = row * topK; i < (row + 1) * topK; i++) {
      const expert = Number(ids.data[i]);
      if (expert === -1 && step.skips) continue;
      if (expert < 0 || expert >= experts || seen.has(expert))
        throw new GraphError(
          `${step.ids}: expected different experts from 0 to ${experts - 1}, found ${expert}` +
            (seen.has(expert) ? " twice" : ""),
        );
      seen.add(expert);
      if (gates.data[i] === 0) continue;
      if (!groups.has(expert)) groups.set(expert, { rows: [], gates: [] });
      groups.get(expert).rows.push(row);
      groups.get(expert).gates.push(gates.data[i]);
    }
  }
  return groups;
}

function gather(x, { rows }) {
  const width = x.shape[1];
  if (rows.length === x.shape[0]) return x;
  const part = filled(x.dtype, [rows.length, width]);
  rows.forEach((row, i) =>
    part.data.set(x.data.subarray(row * width, (row + 1) * width), i * width),
  );
  return part;
}

/** Adds each chosen row times its gate, rounding after every step as float32 does. */
function scatter(y, output, { rows, gates }, whole) {
  const width = y.shape[1];
  rows.forEach((row, i) => {
    const from = (whole ? row : i) * width;
    const to = row * width;
    for (let j = 0; j < width; j++) y.data[to + j] += Math.fround(gates[i] * output.data[from + j]);
  });
}

const widths = new WeakMap();

/** Where no token needs any expert: as wide as what any of them would have given. */
async function outputWidth({ pager }, kind, x) {
  if (!widths.has(kind)) {
    const session = await pager.blank(kind);
    widths.set(kind, typeof session.width === "number" ? session.width : x.shape[1]);
    await session.release();
  }
  return widths.get(kind);
}
