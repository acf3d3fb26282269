// The blackboard executor: it knows graph steps and experts steps, and nothing of models.

import { tokensIn } from "./arrays.js";
import { NonFiniteError } from "./errors.js";
import { runExperts } from "./experts.js";
import { stepReads, stepWrites } from "./manifest.js";

/**
 * Runs the plan's program on `inputs`; gives Maps of the `wanted` values and of every layer's
 * routes, and moves `state` on. If a step fails, or a value is not finite that must be, or
 * `signal` fires, the state is as before.
 */
export async function runProgram(engine, inputs, state, wanted, signal) {
  const { plan } = engine.manifest;
  const tokens = tokensIn(plan, inputs);
  const board = new Map([...inputs, ...state.board(tokens)]);
  // What replaces the state does so for the next call: later steps read the old value.
  const replaced = new Map();
  const routes = new Map();
  for (const step of neededSteps(plan.steps, [...wanted, ...plan.state.keys()])) {
    await engine.breath.take(signal);
    if (step.kind === "experts") {
      board.set(step.y, await runExperts(engine, step, board, signal));
      routes.set(step.layer, { ids: board.get(step.ids), gates: board.get(step.gates) });
    } else {
      for (const [name, array] of await runGraph(engine, step, board))
        (plan.state.has(name) ? replaced : board).set(name, array);
    }
  }
  const values = new Map([...wanted].map((name) => [name, replaced.get(name) ?? board.get(name)]));
  checkFinite(plan, new Map([...values, ...replaced]));
  state.advance(replaced, tokens);
  return { values, routes };
}

/** The steps that `wanted` values depend on, in order. */
export function neededSteps(steps, wanted) {
  const needed = new Set(wanted);
  const kept = [];
  for (const step of steps.toReversed()) {
    if (!stepWrites(step).some((name) => needed.has(name))) continue;
    kept.push(step);
    for (const name of stepReads(step)) needed.add(name);
  }
  return kept.reverse();
}

async function runGraph({ graphs, weights }, step, board) {
  const found = await graphs
    .get(step.graph)
    .run([
      ...[...step.inputs].map(([input, value]) => [input, board.get(value)]),
      ...[...step.weights].map(([input, tensor]) => [input, weights.get(tensor)]),
    ]);
  return [...step.outputs].map(([output, value]) => [value, found.get(output)]);
}

/** States first, in the order of layers: what one of them spoils, those after it only pass on. */
function checkFinite(plan, values) {
  const layer = (name) => Number(/\.(\d+)$/.exec(name)?.[1] ?? -1);
  const states = [...plan.state].sort(([one], [other]) => layer(one) - layer(other));
  for (const [name, { finite }] of states)
    if (finite && values.has(name)) requireFinite("state", name, values.get(name), finite);
  for (const [name, { finite, value }] of plan.outputs)
    if (finite && values.has(value ?? name))
      requireFinite("output", name, values.get(value ?? name), finite);
}

function requireFinite(what, name, { dtype, data }, cause) {
  if (dtype === "i64") return;
  const bad = data.reduce((count, one) => count + (Number.isFinite(one) ? 0 : 1), 0);
  if (bad)
    throw new NonFiniteError(
      `${what} '${name}': expected finite numbers, found ${bad} of ${data.length} infinite or ` +
        `NaN; usually ${cause}`,
      { hint: "The state is as it was before the call; start the sequence anew." },
    );
}
