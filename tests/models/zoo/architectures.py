"""The model classes of transformers' auto mappings, by task."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

FIRST = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")
LAST = ("PRETRAINING", "BASE")


@dataclass(frozen=True)
class Architecture:
    """One model class and the task and config class that the auto mappings list it under."""

    task: str
    model_type: str
    class_name: str

    def classes(self) -> tuple[Any, Any]:
        """The config class and the model class; imports the library's code of this model."""
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type], getattr(transformers, self.class_name)


def architectures() -> list[Architecture]:
    """Every class of the auto mappings once, the four main tasks first, bare models last."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Architecture] = {}
    for task in _tasks(modeling_auto):
        infix = "" if task == "BASE" else f"FOR_{task}_"
        for model_type, names in getattr(modeling_auto, f"MODEL_{infix}MAPPING_NAMES").items():
            for name in names if isinstance(names, (list, tuple)) else (names,):
                found.setdefault(name, Architecture(task.lower(), model_type, name))
    return list(found.values())


def _tasks(modeling_auto: Any) -> list[str]:
    names = [re.fullmatch(r"MODEL_FOR_(\w+)_MAPPING_NAMES", n) for n in dir(modeling_auto)]
    others = sorted({m[1] for m in names if m} - {*FIRST, *LAST})
    return [*FIRST, *others, *LAST]
