"""The reference model, without a second copy of it wherever that can be had."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from soul.data.batches import collate_rows, fitting, length_batches
from soul.data.templates import Encoded
from soul.forward import Answers, forward_answers, unwrap

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Reference:
    """What the objective may ask about the model as it was before unlearning.

    Attributes:
        logps: Cached sequence log-probabilities ``log p_ref(answer | prompt)`` by content key.
        hidden: Cached last hidden states (n, D) at answer positions by content key.
        head: A frozen copy of all that follows the backbone, which turns ``hidden`` into logits.
        states: Cached outputs (n, D) of decoder block ``layer`` at answer positions by content key.
        layer: That block.
        live: Asks a model (adapters off, or a frozen copy) instead of the caches.
        precision: The context in which a head or a copy is asked: what training runs in.
    """

    logps: dict[int, float] = dataclasses.field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    live: Callable[[], Any] | None = None
    states: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    layer: int | None = None
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def sequence_logps(self, answers: Answers) -> torch.Tensor:
        """Return ``log p_ref`` summed over each row's answer tokens, (B,); nan for rows that were not asked about."""
        values = [self.logps.get(key, math.nan) for key in answers.key_B.tolist()]
        dtype = torch.float64 if answers.logits_NV.dtype == torch.float64 else torch.float32
        return torch.tensor(values, dtype=dtype, device=answers.logits_NV.device)

    def logits(self, model: nn.Module, batch: dict[str, torch.Tensor], answers: Answers, view: str) -> torch.Tensor:
        """Return the reference's logits at the answer positions of ``view``, (n, V)."""
        if self.live is not None:
            with self.asking(model) as reference:
                found = forward_answers(reference, batch).logits_NV[answers.select(view)]
        else:
            assert self.head is not None, "the objective did not declare that it needs distributions"
            with torch.no_grad(), self.precision():
                found = self.head(_cached(self.hidden, answers, view))
        return found.to(answers.logits_NV.dtype)

    def block_states(
        self, model: nn.Module, batch: dict[str, torch.Tensor], answers: Answers, view: str
    ) -> torch.Tensor:
        """Return the reference's output of block ``layer`` at the answer positions of ``view``, (n, D)."""
        if self.live is not None:
            with self.asking(model) as reference:
                return forward_answers(reference, batch, self.layer).states(view)
        return _cached(self.states, answers, view)

    @contextlib.contextmanager
    def asking(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the reference as a model: ``model`` with its adapters off, or a frozen copy of what it was."""
        assert self.live is not None, "the objective did not declare that it needs the reference as a model"
        with torch.no_grad(), self.precision(), _trained_as_before(model), self.live() as found:
            reference = found or model
            with _evaluating(reference):
                yield reference


def _cached(values: dict[int, torch.Tensor], answers: Answers, view: str) -> torch.Tensor:
    """Return what was kept for the answer tokens of a view, row by row in the batch's order."""
    rows = answers.row_N[answers.select(view)].unique_consecutive().tolist()
    return torch.cat([values[int(answers.key_B[row])] for row in rows])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and back on, module by module: a reference has one opinion."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _trained_as_before(model: nn.Module) -> Iterator[None]:
    """Let the same parameters be trained afterwards: peft trains every adapter that it puts on again."""
    was = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, trained in was:
            p.requires_grad_(trained)


class _Output(BaseModelOutputWithPast):
    """What a backbone returns; what only some architectures add to it (cross-attentions, router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Recorded(nn.Module):
    """Stands in for a backbone and returns hidden states found earlier."""

    hidden_BTD: torch.Tensor

    def forward(self, *_args: Any, **_kwargs: Any) -> _Output:
        """Return what was recorded, whatever is asked."""
        return _Output(last_hidden_state=self.hidden_BTD)  # type: ignore[arg-type]  # its stub is narrower


class FrozenHead:
    """What a causal language model does after its backbone, as it was when this was made.

    A copy of the model in which the backbone is left out, so that scaling and soft caps of the logits (Granite, Cohere,
    Gemma 2) stay in.

    Args:
        model: A causal language model, wrapped in adapters or not.

    Raises:
        ValueError: The model's backbone cannot be told from its head.

    Example:
        >>> logits_NV = FrozenHead(model)(hidden_ND)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = unwrap(model)
        if hasattr(inner, "get_base_model"):  # inside adapters
            inner = inner.get_base_model()
        backbone = getattr(inner, "base_model", inner)
        if not isinstance(backbone, nn.Module) or backbone is inner:
            raise ValueError(f"{type(inner).__name__} has no backbone of its own")
        self._recorded = _Recorded()
        # deepcopy is told that the backbone is copied already
        self._model = copy.deepcopy(inner, {id(backbone): self._recorded}).requires_grad_(False).eval()
        self._weight = next(self._model.parameters())

    @torch.no_grad()
    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V) of hidden states (N, D)."""
        hidden = hidden_ND.to(self._weight.device, self._weight.dtype)
        self._recorded.hidden_BTD = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return self._model(input_ids=ids, use_cache=False).logits[0]


def build_reference(
    model: nn.Module,
    *,
    logps: Sequence[Encoded] = (),
    distributions: Sequence[Encoded] = (),
    states: Sequence[Encoded] = (),
    layer: int | None = None,
    as_model: bool = False,
    mode: str = "cache",
    pad_id: int = 0,
    max_tokens: int = 4096,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Reference:
    """Ask the model, as it is now, everything the objective will need to know about it later.

    Args:
        model: The model before unlearning.
        logps: Rows whose sequence log-probability is needed (NPO, DPO).
        distributions: Rows whose full next-token distributions are needed (KL, UNDIAL).
        states: Rows whose output of decoder block ``layer`` is needed at answer positions (RMU).
        layer: That block, from 0.
        as_model: The reference must answer as a model, at any position (what some public code asks): with its adapters
            off where that is known to be the model before (:func:`untrained_lora`), else as a frozen copy, and the log
            says so.
        mode: ``"cache"``; ``"adapter_off"`` for distributions from a PEFT model with its adapters off; ``"copy"`` for a
            frozen second copy of the model, which ``"cache"`` too falls back on, and says so in the log, where what a
            model does after its backbone cannot be taken apart.
        pad_id: Padding token.
        max_tokens: Padded tokens in a forward pass, at most (:func:`soul.data.batches.fitting`).
        autocast: The precision training runs in: both sides of a log-ratio must be rounded alike.

    Raises:
        ValueError: Unknown mode, or ``adapter_off`` on a model without adapters, or with others than LoRA that adds
            nothing yet and alone is trained.
    """
    if mode not in ("cache", "adapter_off", "copy"):
        raise ValueError(f"reference mode must be cache, adapter_off or copy, not {mode!r}")
    reference = Reference(layer=layer, precision=autocast)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    wanted = {row.key: row for row in [*logps, *distributions, *states]}
    keep_hidden = {row.key for row in distributions} if mode == "cache" else set()
    keep_states = {row.key for row in states} if mode == "cache" else set()
    rows = list(wanted.values())
    probe: Answers | None = None
    with torch.no_grad(), autocast():
        for group in length_batches([len(row) for row in rows], fitting(max_tokens, device)):
            batch = {k: v.to(device) for k, v in collate_rows([rows[i] for i in group], pad_id=pad_id).items()}
            answers = probe = forward_answers(model, batch, layer if keep_states else None)
            for key, value in zip(
                answers.key_B.tolist(), answers.sum_rows(answers.token_logps()).tolist(), strict=True
            ):
                reference.logps[key] = value
            for i, key in enumerate(answers.key_B.tolist()):
                if key in keep_hidden:
                    reference.hidden[key] = answers.hidden_ND[answers.row_N == i].cpu().clone()
                if key in keep_states and answers.states_ND is not None:
                    reference.states[key] = answers.states_ND[answers.row_N == i].cpu().clone()
        if mode == "cache" and distributions:
            assert probe is not None
            reference.head = _frozen_head(model, probe)
    model.train(was_training)
    live = (distributions and reference.head is None) or (states and mode != "cache")
    if as_model and mode == "cache":
        mode = "adapter_off" if hasattr(model, "disable_adapter") and _is_before_when_off(model) else mode
        if mode == "cache":
            log.warning("this objective asks a frozen copy of the model, which takes as much memory again")
    if live or as_model:
        reference.hidden.clear()
        reference.states.clear()
        reference.live = _ask_live(model, "copy" if mode == "cache" else mode)
    return reference


def _frozen_head(model: nn.Module, probe: Answers) -> FrozenHead | None:
    """Return the model's head, or None where it does not give the logits that the model itself has just given."""
    try:
        head = FrozenHead(model)
        again = head(probe.hidden_ND)
    except Exception as error:  # noqa: BLE001 - models in other people's code do what they like around their backbone
        log.warning("KL asks a frozen copy of the model, which takes as much memory again: %s", error)
        return None
    if again.shape == probe.logits_NV.shape and (again - probe.logits_NV).norm() <= 1e-2 * probe.logits_NV.norm():
        return head
    log.warning("KL asks a frozen copy of the model, which takes as much memory again: its logits need its backbone")
    return None


def _ask_live(model: nn.Module, mode: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if mode == "copy":
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        return lambda: contextlib.nullcontext(frozen)
    disable = getattr(model, "disable_adapter", None)
    if disable is None:
        raise ValueError("reference mode adapter_off needs a model with adapters (adapter: {r: 8, ...})")
    if not _is_before_when_off(model):
        raise ValueError(
            "reference mode adapter_off takes the model with its adapters off for the model before, which it is where "
            "plain LoRA alone is trained, and this adapter is another one or has been trained already: set "
            "training.reference to cache or copy, or merge the adapter first"
        )
    return disable


def _is_before_when_off(model: nn.Module) -> bool:
    """Say whether a model with its adapters off is, and stays, what it is now: what else is trained is not off."""
    return untrained_lora(model) and all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def untrained_lora(model: nn.Module) -> bool:
    """Say whether all adapters on a model are plain LoRA that changes nothing yet: of others it is not known.

    The factor that peft begins as 0 still is; biases, whole modules and magnitudes (DoRA) are not trained along.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    more = ("modules_to_save", "trainable_token_indices", "use_dora")
    plain = all(
        c.peft_type == "LORA" and c.bias == "none" and not any(getattr(c, name, None) for name in more) for c in configs
    )
    begin_as_zero = (".lora_B.", ".lora_embedding_A.")  # peft draws the other one at random
    factors = (p for name, p in model.named_parameters() if any(x in name for x in begin_as_zero))
    return bool(configs) and plain and not any(bool(p.any()) for p in factors)
