"""A sample of the zoo, spread over the kinds of models; `make zoo` tries them all."""

from __future__ import annotations

from functools import cache

import pytest
from models.zoo import Architecture, architectures, trial

SAMPLE = {
    "causal language model": ("GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM"),
    "state space": ("Lfm2ForCausalLM",),
    "masked language model": ("BertForMaskedLM", "FNetForMaskedLM", "DebertaForMaskedLM"),
    "encoder and decoder": ("T5ForConditionalGeneration", "MarianMTModel"),
    "classification of text": (
        "DistilBertForSequenceClassification",
        "ElectraForTokenClassification",
        "AlbertForQuestionAnswering",
        "MPNetForMultipleChoice",
    ),
    "text with places": ("LayoutLMForMaskedLM",),
    "images": ("ViTForImageClassification", "ResNetForImageClassification"),
    "dense": ("DPTForDepthEstimation", "YolosForObjectDetection"),
    "sound": ("ASTForAudioClassification", "Speech2TextForConditionalGeneration"),
    "text and images": ("CLIPModel", "LlavaForConditionalGeneration"),
    "time series": ("PatchTSTForRegression",),
    "bare": ("RobertaModel", "ConvNextModel"),
}
NAMES = [name for names in SAMPLE.values() for name in names]


@cache
def known() -> dict[str, Architecture]:
    return {architecture.class_name: architecture for architecture in architectures()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_captured_bitwise_at_two_shapes_with_gradients(name: str) -> None:
    *_, record = trial(known()[name])
    assert record["outcome"] == "captured", record
    assert record["other_shape"] == "bitwise", record
    assert record["gradients"] == "bitwise", record


def test_the_sample_is_25_models_of_many_kinds() -> None:
    assert len(set(NAMES)) == len(NAMES) == 25
    assert len({known()[name].task for name in NAMES}) >= 12
