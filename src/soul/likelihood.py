"""Likelihoods of many answers with each common beginning read once: wrong answers share the prompt, and often more."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from soul.data.batches import collate_rows, fitting, length_batches
from soul.data.templates import Encoded
from soul.forward import forward_answers, head_on, unwrap

Count = Callable[[int, int], None]

_WIDTH = 6
"""Attention to this times the hidden size D of tokens is as much work as the rest: 12 D^2 weights, 2 D a token seen."""
_WORTH_A_TREE, _WORTH_A_CACHE = 0.9, 2 / 3
"""Share of the work that trees may take of reading whole, and keys and values of what trees take: they are copied."""


@torch.no_grad()
def sequence_nll(
    model: Any, rows: Sequence[Encoded], *, pad_id: int, max_tokens: int = 4096, progress: Count | None = None
) -> list[float]:
    """Return the mean NLL of each row's answer tokens, ``-1/|y| sum_t log p(y_t | x, y_<t)``, in nats a token.

    Rows that begin alike up to their answer are measured together, by the first of these ways that the model allows:

    1. As trees: each token after a common beginning goes through the model once, also within answers, and attends to
       what stands before it. Needs rotary positions and attention to everything before, in transformers' own code. A
       tree has at most ``max_tokens`` nodes, and no more than make it cheaper a row: its attention grows with their
       square. Where that leaves little to save, rows are read the second or the third way.
    2. The prompt goes through the model once, and its keys and values serve all its answers.
    3. Every row is read whole, as are rows whose prompt is theirs alone.

    The numbers are the same up to rounding. Memory is that of ``max_tokens``, or of the longest row, however many rows
    share a prompt.

    Args:
        model: A causal language model; it is run in its own dtype, without autocast.
        rows: Tokenised examples.
        pad_id: Token that fills rows up.
        max_tokens: Padded tokens in a batch, at most, those of a prompt whose keys and values are kept included
            (:func:`soul.data.batches.fitting`).
        progress: Called with (done, of).
    """
    values = [math.nan] * len(rows)
    max_tokens = fitting(max_tokens, next(model.parameters()).device)
    alone, shared = _by_prompt(rows) if _can_share(model) else (list(range(len(rows))), [])
    done = 0

    def note(group: Sequence[int], nll: Sequence[float]) -> None:
        nonlocal done
        for i, value in zip(group, nll, strict=True):
            values[i] = value
        done += len(group)
        if progress:
            progress(done, len(rows))

    if _can_branch(model):
        width = _WIDTH * _without_adapters(model).config.get_text_config().hidden_size
        parts, shared, rest = _arrange(rows, shared, max_tokens, width)
        alone += rest
        trees = [_grow([rows[i] for i in part]) for part in parts]
        for picked in length_batches([len(tree.tokens) for tree in trees], max_tokens):
            nll = _in_trees(model, [trees[i] for i in picked], pad_id)
            note([i for p in picked for i in parts[p]], nll)
    for groups in _same_length(rows, shared, max_tokens):
        flat = [i for group in groups for i in group]
        for picked, nll in _after_prompts(model, [[rows[i] for i in group] for group in groups], pad_id, max_tokens):
            note([flat[i] for i in picked], nll)
    for picked in length_batches([len(rows[i]) for i in alone], max_tokens):
        group = [alone[i] for i in picked]
        note(group, _whole(model, [rows[i] for i in group], pad_id))
    return values


@torch.no_grad()
def extraction_strength(
    model: Any, rows: Sequence[Encoded], *, pad_id: int, max_tokens: int = 4096, progress: Count | None = None
) -> tuple[list[float], list[float]]:
    """Return each answer's mean NLL and its extraction strength, from the same forward passes.

    ``ES = 1 - min{k : greedy decoding from x and y_<k gives the rest of y} / |y|`` (arXiv 2012.07805 in spirit; defined
    so in arXiv 2506.12618): 1 where the question alone brings the answer, 0 where even its last token must be given.
    Greedy decoding gives the rest exactly where the most likely token is the true one at every later position, so one
    teacher-forced pass tells. The end-of-turn token counts as one of ``|y|``, as it does in all contests on record; the
    benchmarks leave it out (:func:`soul.metrics.memorization.answer_matches`).

    Args:
        model: A causal language model; it is run in its own dtype, without autocast.
        rows: Tokenised examples.
        pad_id: Token that fills rows up.
        max_tokens: Padded tokens in a batch, at most (:func:`soul.data.batches.fitting`).
        progress: Called with (done, of).
    """
    nll, strength = [math.nan] * len(rows), [math.nan] * len(rows)
    device = next(model.parameters()).device
    done = 0
    for picked in length_batches([len(row) for row in rows], fitting(max_tokens, device)):
        batch = collate_rows([rows[i] for i in picked], pad_id=pad_id)
        answers = forward_answers(model, {k: v.to(device) for k, v in batch.items()})
        sums = answers.sum_rows(-answers.token_logps()).tolist()
        right = (answers.logits_NV.argmax(-1) == answers.targets_N).split([rows[i].answer_length for i in picked])
        for i, total, matches in zip(picked, sums, right, strict=True):
            wrong = (~matches).nonzero()
            given = int(wrong[-1]) + 1 if len(wrong) else 0
            nll[i], strength[i] = total / len(matches), 1 - given / len(matches)
        done += len(picked)
        if progress:
            progress(done, len(rows))
    return nll, strength


def _whole(model: Any, rows: Sequence[Encoded], pad_id: int) -> list[float]:
    """Read every row from its first token to its last."""
    device = next(model.parameters()).device
    batch = collate_rows(rows, pad_id=pad_id)
    answers = forward_answers(model, {k: v.to(device) for k, v in batch.items()})
    sums = answers.sum_rows(-answers.token_logps()).tolist()
    return [total / row.answer_length for total, row in zip(sums, rows, strict=True)]


def _by_prompt(rows: Sequence[Encoded]) -> tuple[list[int], list[list[int]]]:
    """Return the rows whose prompt is theirs alone, and groups of rows that share one."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_prefix(row), []).append(i)
    shared = [group for prefix, group in groups.items() if prefix and len(group) > 1]
    taken = {i for group in shared for i in group}
    return [i for i in range(len(rows)) if i not in taken], shared


def _prefix(row: Encoded) -> tuple[int, ...]:
    """Everything before the token that predicts the first answer token."""
    return row.input_ids[: row.answer_start - 1]


def _same_length(rows: Sequence[Encoded], groups: list[list[int]], max_tokens: int) -> list[list[list[int]]]:
    """Batch groups whose prompts have the same length: then nothing is padded before an answer.

    Padding there would shift positions, and leaves rows that attend to nothing where a model looks back only so far.
    """
    by_length: dict[int, list[list[int]]] = {}
    for group in groups:
        by_length.setdefault(rows[group[0]].answer_start, []).append(group)
    batches = []
    for length, members in sorted(by_length.items(), reverse=True):
        size = max(1, max_tokens // length)
        batches += [members[i : i + size] for i in range(0, len(members), size)]
    return batches


def _without_adapters(model: nn.Module) -> Any:
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _can_share(model: nn.Module) -> bool:
    """Say whether the model keeps keys and values that a later call can go on from."""
    inner = _without_adapters(model)
    takes = inspect.signature(inner.forward).parameters
    # A recurrent state is no list of keys and values, and not every model that has one can be continued in parallel.
    stateful = getattr(inner, "_is_stateful", False)
    return not stateful and "attention_mask" in takes and bool(_cache_argument(inner))


def _cache_argument(inner: nn.Module) -> str:
    """Return what the model calls its keys and values (``cache`` since transformers 5.24), or nothing."""
    takes = inspect.signature(inner.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in takes), "")


def _after_prompts(
    model: Any, groups: Sequence[Sequence[Encoded]], pad_id: int, max_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Read each group's prompt once, then its answers; returns (positions in the flattened groups, their NLL)."""
    device = next(model.parameters()).device
    ids = torch.tensor([_prefix(group[0]) for group in groups], device=device)
    inner: Any = unwrap(model)
    cache = DynamicCache(config=inner.config)
    name = _cache_argument(_without_adapters(model))
    with head_on(model, torch.zeros_like(ids, dtype=torch.bool)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{name: cache})
    flat = [(g, row) for g, group in enumerate(groups) for row in group]
    found = []
    for picked in length_batches([len(row) for _, row in flat], max_tokens):  # each row has a copy of its prompt's keys
        of = torch.tensor([flat[i][0] for i in picked], device=device)
        tails = [flat[i][1].input_ids[flat[i][1].answer_start - 1 :] for i in picked]
        longest = max(map(len, tails)) - 1
        lengths = torch.tensor([len(t) - 1 for t in tails], device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        tokens = torch.tensor([list(t) + [pad_id] * (longest + 1 - len(t)) for t in tails], device=device)
        own = copy.deepcopy(cache)  # the forward pass appends to it
        own.batch_select_indices(of)
        with head_on(model, real):
            out = model(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([torch.ones_like(ids)[of], real.long()], dim=1),
                use_cache=True,
                **{name: own},
            )
        logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
        nll = nn.functional.cross_entropy(logits, tokens[:, 1:][real], reduction="none")
        rows = torch.arange(len(picked), device=device)[:, None].expand_as(real)[real]
        sums = torch.zeros(len(picked), dtype=nll.dtype, device=device).index_add(0, rows, nll)
        found.append((picked, (sums / lengths).tolist()))
    return found


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Rows that begin alike, with each common beginning once.

    Attributes:
        tokens: Token of each node; parents come before their children. A row's last token, which predicts nothing, is
            no node.
        parents: Node before each node; -1 before the first.
        depths: Position of each node in its rows.
        nodes: For each answer token of each row, the node that predicts it.
        targets: The answer tokens.
        rows: Row of each answer token.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    nodes: list[int]
    targets: list[int]
    rows: list[int]


def _grow(rows: Sequence[Encoded]) -> _Tree:
    tree = _Tree([], [], [], [], [], [])
    known: dict[tuple[int, int], int] = {}  # (parent, token): node
    for r, row in enumerate(rows):
        node = -1
        for t, token in enumerate(row.input_ids):
            if t >= row.answer_start:
                tree.nodes.append(node)
                tree.targets.append(token)
                tree.rows.append(r)
            if t == len(row) - 1:
                break
            parent, node = node, known.setdefault((node, token), len(tree.tokens))
            if node == len(tree.tokens):
                tree.tokens.append(token)
                tree.parents.append(parent)
                tree.depths.append(t)
    return tree


def _work(read: int, seen: int, width: int) -> int:
    """Return the work of reading tokens that attend to ``seen`` each, of which ``width`` are as much as the rest."""
    return read * (width + seen)


def _arrange(
    rows: Sequence[Encoded], groups: Sequence[Sequence[int]], max_tokens: int, width: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return what of the groups is read as trees, what after its prompt, and what whole, by estimated work."""
    trees, after, whole = list[list[int]](), list[list[int]](), list[int]()
    for group in groups:
        parts, rest, work = _split(rows, group, max_tokens, width)
        prompt = rows[group[0]].answer_start - 1
        lengths = [len(rows[i]) - 1 for i in group]
        continued = _work(prompt, prompt, width) + sum(_work(n - prompt, n, width) for n in lengths)
        if continued < _WORTH_A_CACHE * work:
            after.append(list(group))
        else:
            trees += parts
            whole += rest
    return trees, after, whole


def _split(
    rows: Sequence[Encoded], group: Sequence[int], max_tokens: int, width: int
) -> tuple[list[list[int]], list[int], int]:
    """Return the trees that a group makes, the rows that are better read whole, and the work of both.

    A row joins the tree before it where that has room and the share of the work that it takes does not rise.
    """
    begun: list[tuple[list[int], int, int]] = []  # rows, nodes, work of reading the rows whole
    before: tuple[int, ...] = ()
    for i in sorted(group, key=lambda i: rows[i].input_ids[:-1]):  # what has most in common stands side by side
        ids = rows[i].input_ids[:-1]
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        before, alone = ids, _work(len(ids), len(ids), width)
        if begun:
            part, old, whole = begun[-1]
            nodes = old + len(ids) - common
            if nodes <= max_tokens and _work(nodes, nodes, width) * whole <= _work(old, old, width) * (whole + alone):
                part.append(i)
                begun[-1] = part, nodes, whole + alone
                continue
        begun.append(([i], len(ids), alone))
    parts, rest, total = list[list[int]](), list[int](), 0
    for part, nodes, whole in begun:
        work = _work(nodes, nodes, width)
        saves = work < _WORTH_A_TREE * whole
        if saves:
            parts.append(part)
        else:
            rest += part
        total += work if saves else whole
    return parts, rest, total


def _can_branch(model: nn.Module) -> bool:
    """Say whether a token's place is told by ``position_ids`` and its sight by a mask, and by nothing else.

    True of rotary positions without windows in transformers' own classes, under the attention that takes masks of any
    shape. Slopes (ALiBi), windows, recurrent layers and soft prompts go by the order of the batch.
    """
    inner = _without_adapters(model)
    config = inner.config.get_text_config()
    own = type(inner).__module__.startswith("transformers.")
    rotary = bool(getattr(config, "rope_parameters", None)) and not getattr(config, "alibi", False)
    bounded = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    adapters = getattr(unwrap(model), "peft_config", {}).values()
    return (
        own
        and rotary
        and hasattr(config, "hidden_size")
        and not bounded
        and kinds <= {"full_attention"}
        and config._attn_implementation == "sdpa"
        and "position_ids" in inspect.signature(inner.forward).parameters
        and not any(adapter.is_prompt_learning for adapter in adapters)
    )


def _in_trees(model: Any, trees: Sequence[_Tree], pad_id: int) -> list[float]:
    """Read trees, one a row of the batch; returns the NLL of their rows, tree after tree."""
    device = next(model.parameters()).device
    sizes = [len(tree.tokens) for tree in trees]
    ids, positions = (torch.full((len(trees), max(sizes)), fill) for fill in (pad_id, 0))
    sees = np.zeros((len(trees), 1, max(sizes), max(sizes)), dtype=bool)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for b, tree in enumerate(trees):
        ids[b, : sizes[b]], positions[b, : sizes[b]] = torch.tensor(tree.tokens), torch.tensor(tree.depths)
        keep[b, tree.nodes] = True
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                sees[b, 0, node] = sees[b, 0, parent]
            sees[b, 0, node, node] = True
        padding = range(sizes[b], max(sizes))
        sees[b, 0, padding, padding] = True  # a softmax over nothing is nan
    with head_on(model, keep.to(device)):
        logits_NV = model(
            input_ids=ids.to(device),
            attention_mask=torch.from_numpy(sees).to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).logits
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    place = keep.flatten().cumsum(0).view(keep.shape) - 1  # of a node among those the head saw
    at = torch.cat([place[b, tree.nodes] for b, tree in enumerate(trees)]).to(device)
    targets = torch.tensor([token for tree in trees for token in tree.targets], device=device)
    # in pieces: no second N x V, and what stays in the cache is summed twice as fast
    log_sums = torch.cat([piece.logsumexp(-1) for piece in logits_NV.split(64)])
    nll = (log_sums[at] - logits_NV[at, targets]).tolist()
    sums: dict[tuple[int, int], list[float]] = {}
    for key, value in zip(((b, r) for b, tree in enumerate(trees) for r in tree.rows), nll, strict=True):
        sums.setdefault(key, []).append(value)
    return [math.fsum(found) / len(found) for found in sums.values()]
