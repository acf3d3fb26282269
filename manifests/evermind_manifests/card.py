"""The model card: README.md with Hugging Face front matter, from the manifest alone.

A user's words may hold anything; here they cannot become YAML structure, HTML or links.
Front matter fields: the Hugging Face model card specification.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence

from .manifest import Card, Manifest

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~])")


def render_card(manifest: Manifest) -> str:
    """The whole README.md of a package; the same manifest always gives the same text."""
    card = manifest.card or Card()
    sections = [
        _front_matter(manifest, card),
        f"# {_inline(manifest.name)}",
        _introduction(manifest),
        _prose(card.description),
        _table(("", ""), _facts(manifest, card)),
        _experts(manifest),
        _configuration(manifest),
        "## Use it\n\n"
        "```sh\n"
        f"pip install 'evermind-pack[{_extras(manifest)}]'\n"
        "evermind-pack validate . --deep --run\n"
        f"{_run_command(manifest)}\n"
        "```",
        f"## Training\n\n{_prose(card.training_summary)}" if card.training_summary else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(manifest: Manifest, card: Card) -> str:
    tags = [*dict.fromkeys(["moe", "onnx", "evermind-pack", manifest.family, *card.tags])]
    lines = ["---"]
    if card.license is not None:
        lines.append(f"license: {_quote(card.license)}")
    lines.append('library_name: "evermind-pack"')
    if _generates_text(manifest):
        lines.append('pipeline_tag: "text-generation"')
    if card.base_model is not None:
        lines.append(f"base_model: {_quote(card.base_model)}")
    for field, values in (("datasets", card.datasets), ("language", card.language), ("tags", tags)):
        if values:
            lines.append(f"{field}:")
            lines += [f"- {_quote(value)}" for value in values]
    return "\n".join([*lines, "---"])


def _generates_text(manifest: Manifest) -> bool:
    return "tokens" in manifest.plan.inputs and "logits" in manifest.plan.outputs


def _introduction(manifest: Manifest) -> str:
    text = f"A `{_code(manifest.family)}` model as an evermind-pack package: small ONNX graphs, and"
    if manifest.layers:
        return f"{text} one shard per expert, so that experts can be paged where memory is small."
    return f"{text} the weights beside them."


def _facts(manifest: Manifest, card: Card) -> Iterable[tuple[str, str]]:
    parameters = manifest.parameters
    yield "family", f"`{_code(manifest.family)}`"
    yield "version", _inline(manifest.version)
    yield "parameters", f"{parameters.total:,} in all, {parameters.active:,} active per token"
    if manifest.layers:
        experts = sum(shard.bytes for shard in manifest.shards)
        yield "MoE layers", str(len(manifest.layers))
        yield "experts", f"{len(manifest.shards):,} shards, {_size(experts)}"
    if manifest.resident is not None and manifest.resident in manifest.files:
        yield "always in memory", _size(manifest.files[manifest.resident].bytes)
    yield "whole package", _size(sum(entry.bytes for entry in manifest.files.values()))
    if card.author is not None:
        yield "author", _inline(card.author)
    if manifest.created is not None:
        yield "created", _inline(manifest.created)


def _experts(manifest: Manifest) -> str:
    if not manifest.layers:
        return ""
    rows: dict[tuple[str, int, int], list[int]] = {}
    for layer in manifest.layers:
        rows.setdefault((layer.kind, layer.experts, layer.top_k), []).append(layer.layer)
    table = _table(
        ("layers", "kind", "experts", "top-k", "bytes per expert", "dtypes"),
        (
            (
                _ranges(layers),
                f"`{_code(name)}`",
                str(experts),
                str(top_k),
                _size(manifest.kinds[name].bytes),
                ", ".join(sorted({spec.dtype for spec in manifest.kinds[name].tensors})),
            )
            for (name, experts, top_k), layers in rows.items()
            if name in manifest.kinds
        ),
    )
    return f"## Experts\n\n{table}"


def _configuration(manifest: Manifest) -> str:
    scalars = {
        key: value
        for key, value in sorted(manifest.config.items())
        if isinstance(value, str | int | float | bool)
    }
    if not scalars:
        return ""
    table = _table(
        ("", ""),
        ((f"`{_code(key)}`", _inline(json.dumps(value))) for key, value in scalars.items()),
    )
    return f"## Configuration\n\n{table}"


def _extras(manifest: Manifest) -> str:
    tokenizer = manifest.tokenizer
    return "cpu,text" if tokenizer is not None and tokenizer.kind == "tokenizers" else "cpu"


def _run_command(manifest: Manifest) -> str:
    if _generates_text(manifest):
        tokenizer = manifest.tokenizer
        if tokenizer is not None and tokenizer.chat_templates:
            return "evermind-pack run . --chat"
        prompt = "--tokens 1,2,3" if tokenizer is None else "--prompt 'Once upon a time'"
        return f"evermind-pack run . {prompt} --max-new 64"
    return "evermind-pack run . --inputs inputs.npz --outputs outputs.npz"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{count:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _inline(text: str) -> str:
    """One line of plain text, for a heading or a table's cell."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _prose(text: str) -> str:
    """Paragraphs of plain text; blank lines stay."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    # At the start of a line these begin a heading, a list or a rule.
    return "\n\n".join(re.sub(r"^([#=+-])", r"\\\1", _inline(text)) for text in paragraphs)


def _code(text: str) -> str:
    """Text inside backticks, where nothing can be escaped."""
    return html.escape(" ".join(text.split()), quote=False).replace("`", "'").replace("|", "/")


def _quote(text: str) -> str:
    """A YAML double-quoted scalar in printable ASCII; YAML reads JSON's escapes, and \\U."""
    return "".join(
        character
        if " " <= character <= "~"
        else (
            f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
        )
        for character in json.dumps(text, ensure_ascii=False)
    )
