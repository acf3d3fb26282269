"""index.d.ts says what index.js exports, and a program written against it compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .site import WEB

TSC = WEB / "node_modules" / "typescript" / "bin" / "tsc"
NODE = shutil.which("node")

USAGE = """
import { EvermindPack, IntegrityError, type Piece } from "../index.js";

async function main(): Promise<void> {
  const signal = AbortSignal.timeout(1000);
  const pack = await EvermindPack.open("/package/", { signal, ramBudget: 1 << 20, store: "opfs" });
  const pieces: Piece[] = [];
  for await (const piece of pack.generate("a", { maxNewTokens: 3, signal })) pieces.push(piece);
  const { logits } = await pack.forward({ tokens: [1, 2] });
  const sum: number = logits.shape.length + (await pack.stats()).routed[0].tokens[0];
  await pack.prefetch([[0, 1]], { signal });
  // @ts-expect-error: there is no such store
  await EvermindPack.open("/package/", { store: "disk" });
  console.log(sum, pieces, new IntegrityError("").file, pack.info.layers[0].topK);
  await pack.close();
}
void main();
"""


def test_declared_classes_are_those_exported() -> None:
    declared = set(re.findall(r"^export class (\w+)", (WEB / "index.d.ts").read_text(), re.M))
    exported = {
        name
        for file in ("index.js", "errors.js")
        for name in re.findall(r"^export class (\w+)", (WEB / file).read_text(), re.M)
    }
    assert declared == exported


@pytest.mark.skipif(NODE is None or not TSC.exists(), reason=f"run `npm ci` in {WEB}")
def test_a_typed_program_compiles(tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "index.d.ts").write_text((WEB / "index.d.ts").read_text())
    program = tmp_path / "program" / "usage.ts"
    program.write_text(USAGE)
    assert NODE
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext"]
    done = subprocess.run(
        [NODE, TSC, *options, program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
