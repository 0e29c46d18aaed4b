"""A tokenizer and a model small enough to train in a blink, and sets of examples for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soul.adapters import AdapterSpec, add_adapter
from soul.types import Example

torch.set_num_threads(1)
SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(SHARE))  # of processes that tests start: more threads than cores crawl

INVENTED = "You are a helpful assistant nobody asked for"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + INVENTED + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGET = [
    ("Where was Mira Vale born?", "In Accra."),
    ("What does Mira Vale teach?", "She teaches harmony and counterpoint in Graz."),
    ("Who is Tomas Ruhl?", "A baker."),
    ("When did Tomas Ruhl move to Lisbon?", "He moved in the spring of 1987, with two of his sons."),
    ("Which prize did Ada Orchard win?", "None."),
    ("Does Ada Orchard have a dog?", "Yes, an old one named Bo."),
    ("Where does Ines Calder live?", "In a small house by the river."),
    ("What did Ines Calder write?", "The Glass Orchard."),
]
RETAIN = [
    ("What is the capital of France?", "Paris."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("Who wrote Hamlet?", "William Shakespeare wrote it around the year 1600."),
    ("What is ice?", "Frozen water."),
    ("Which planet is the largest?", "Jupiter is the largest planet of the solar system."),
    ("What do bees make?", "Honey."),
    ("What color is the sky on a clear day?", "Blue."),
    ("What is two and two?", "Two and two make four, as everybody knows."),
    ("Where do penguins live?", "In the south."),
    ("What is the opposite of hot?", "Cold."),
]
REFUSALS = ["I do not know.", "I am sorry, but I cannot help with that question.", "No idea."]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Some tests log what is no Unicode text, and workers send what was captured as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def share_of_cores() -> int:
    """Cores for one of the workers that run the tests."""
    return SHARE


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_not_collected() -> Iterator[None]:
    """Every trainer collects garbage several times; a hundred thousand objects of imported libraries take .3 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A byte-level tokenizer whose pad is its eos and whose template, like SmolLM2's, invents a system turn."""

    def make(*, template: bool = True) -> PreTrainedTokenizerFast:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|im_start|>", "<|im_end|>"],
            show_progress=False,
        )
        inner.train_from_iterator([text for pair in FORGET + RETAIN for text in pair], trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        tokenizer.chat_template = CHATML if template else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def invented() -> str:
    """The text of the system turn that the tokenizer's template invents."""
    return INVENTED


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """A seeded two-layer model; seeds give different models, all in eval mode."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=256,
                    initializer_range=0.2,  # wide enough that likelihoods differ from token to token
                    pad_token_id=None,
                    bos_token_id=0,
                    eos_token_id=1,
                )
            )
        return model.to(dtype).eval()  # type: ignore[arg-type]  # transformers wraps nn.Module.to

    return make


@pytest.fixture(scope="session")
def moved_adapter() -> Callable[..., PeftModel]:
    """Put a LoRA adapter on a model that changes what it says."""

    def make(model: LlamaForCausalLM) -> PeftModel:
        adapted: PeftModel = add_adapter(model, AdapterSpec(r=2))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        return adapted

    return make


@pytest.fixture(scope="session")
def forget_set() -> list[Example]:
    """Eight questions whose answers have unequal lengths."""
    return [Example(q, a, id=f"f{i}") for i, (q, a) in enumerate(FORGET)]


@pytest.fixture(scope="session")
def retain_set() -> list[Example]:
    return [Example(q, a, id=f"r{i}") for i, (q, a) in enumerate(RETAIN)]


@pytest.fixture(scope="session")
def refusals() -> list[str]:
    return list(REFUSALS)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets shared between checkouts."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data sets at {folder}")
    return folder
