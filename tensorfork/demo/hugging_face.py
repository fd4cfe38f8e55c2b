"""A model from a local Hugging Face folder; nothing is downloaded, and no code from the folder is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tensorfork.demo.failure import DemoFailed
from tensorfork.demo.models import Computed, nothing_computed, similarities

SENTENCES = [
    "How do I reset my password?",
    "I cannot log in any more, what now?",
    "The recipe asks for two eggs and some flour.",
    "Rain is expected in the north tonight.",
]
TOKENS = 16
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


class HuggingFaceModel:
    """A model whose folder has config.json and, for `load`, safetensors. Raises `DemoFailed` for other folders."""

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        self._path, self._dtype = path, dtype
        try:
            self._config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        except (ValueError, OSError, KeyError) as error:
            raise DemoFailed(
                f"transformers {transformers.__version__} cannot read {path}/config.json: {error}"
            ) from error
        if getattr(self._config, "quantization_config", None) is not None:
            raise DemoFailed(f"{path} is quantized; its layout depends on the engine, and the demo has none")
        self._config.use_cache = False

    def load(self) -> torch.nn.Module:
        """See `DemoModel.load`."""
        model = self._class().from_pretrained(
            self._path, config=self._config, dtype="auto", local_files_only=True, use_safetensors=True
        )
        return _for_inference(model)

    def build(self) -> torch.nn.Module:
        """See `DemoModel.build`."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self._dtype or "float32"))
        try:
            with torch.device("meta"):
                model_class: Any = self._class()
                make = transformers.AutoModel.from_config if model_class is transformers.AutoModel else model_class
                return _for_inference(make(self._config))
        finally:
            torch.set_default_dtype(before)

    @torch.inference_mode()
    def compute(self, model: torch.nn.Module) -> Computed:
        """See `DemoModel.compute`."""
        if getattr(model, "main_input_name", "input_ids") != "input_ids":
            return nothing_computed(f"its inputs are {model.main_input_name}, and the demo has only text")
        inputs, shown, kind = self._inputs()
        if self._config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
        returned = model(**inputs, output_hidden_states=True)
        outputs = dict(_flatten("", dict(returned)))
        hidden = _last_hidden_state(returned)
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * mask).sum(1) / mask.sum(1)
        return Computed({**outputs, "vectors": vectors}, shown, kind, list(vectors.shape), similarities(vectors))

    def _class(self) -> Any:
        """The class that config.json names, or else the one that transformers chooses."""
        for name in self._config.architectures or []:
            if hasattr(transformers, name):
                return getattr(transformers, name)
        return transformers.AutoModel

    def _inputs(self) -> tuple[dict[str, torch.Tensor], list[str], str]:
        """The model's inputs, the same in words, and what they are."""
        if any((self._path / name).exists() for name in _TOKENIZERS):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._path, local_files_only=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
            return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt")), SENTENCES, "sentences"
        size = self._config.get_text_config().vocab_size
        ids = torch.randint(0, size, (len(SENTENCES), TOKENS), generator=torch.Generator().manual_seed(0))
        shown = [f"random token ids, row {i + 1}" for i in range(len(SENTENCES))]
        kind = "rows of random token ids (the folder has no tokenizer)"
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, shown, kind


def _for_inference(model: Any) -> torch.nn.Module:
    evaluated: torch.nn.Module = model.eval()
    return evaluated.requires_grad_(False)


def _last_hidden_state(returned: Any) -> torch.Tensor:
    for name in ("last_hidden_state", "encoder_last_hidden_state"):
        if isinstance(returned.get(name), torch.Tensor):
            hidden: torch.Tensor = returned[name]
            return hidden
    last: torch.Tensor = (returned.get("hidden_states") or returned["encoder_hidden_states"])[-1]
    return last


def _flatten(path: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts and sequences, with its path such as ``hidden_states.3``."""
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return []
    return [pair for key, item in items for pair in _flatten(f"{path}.{key}".removeprefix("."), item)]
