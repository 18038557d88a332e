"""transformers' own tests of its Chameleon, run on this implementation instead.

    python tests/transformers_suite.py ~/transformers           # a checkout of transformers
    python tests/transformers_suite.py ~/transformers --theirs  # the same tests on their classes

The checkout's version must be the installed one's; its tests also need `parameterized` and
`requests`. Options behind these are pytest's. Printed are the failures, and passed and failed for
each file. Nothing of transformers is copied: names are swapped before its test files are imported.

transformers 5.24               ours: passed  failed  skipped    theirs: passed  failed  skipped
test_modeling_chameleon.py             174     36      120               210     10      110
test_image_processing_chameleon.py      21      2        8                28      0        3

failed  why
6       gradient checkpointing: they look for transformers' own layer class and attributes
6       init_weights, post_init, _initialize_weights: how transformers initializes
4       config._attn_implementation: here the model holds its attention, not the config
4       from_pretrained has no state_dict and no ignore_mismatched_sizes
4       a tensor that is missing or of a wrong type is an error, not a warning
2       hidden_size 37 with 32 heads is an error
2       forward has no shift_labels
2       resize_token_embeddings: the words of an error message
2       enable_input_require_grads: checkpointing works without it
2       no generation_config.json is written: config.json holds the ids
2       from_pretrained under torch.device("meta") is no error
2       the image processor has no to_json_file, and is not made by AutoImageProcessor
21 more are skipped here: the torchvision form of the image processor, RoPE as a module, outputs by
hooks, and attention chosen in the config.
tests/models/chameleon/test_processing_chameleon.py is left out: it makes the processor from a
tokenizer of transformers, and ours takes its own.
"""

import sys
import types
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("modeling", "image_processing")
# Empty classes take the place of three mixins, about subjects outside this project.
OUTSIDE = {"tests.generation.test_utils": "GenerationTesterMixin",
           "tests.exporters.test_export": "ExportTesterMixin",
           "tests.test_pipeline_mixin": "PipelineTesterMixin"}
SWAPPED = ("ChameleonConfig", "ChameleonVQVAEConfig", "ChameleonModel", "PreTrainedModel",
           "ChameleonForConditionalGeneration", "ChameleonImageProcessor")


def swap() -> None:
    """Puts our classes where transformers' tests look for its own, with the names they read."""
    import_module("tests.test_configuration_common")  # it loads transformers a second time
    import transformers

    sys.path.insert(0, str(ROOT))
    ours, tokenizer = import_module("chameleon"), import_module("tokenizer")
    model, config = ours.PreTrainedModel, ours.ChameleonConfig

    # What a test reads to learn what a class can do.
    config.sub_configs, ours.ChameleonVQVAEConfig.sub_configs = {
        "vq_config": ours.ChameleonVQVAEConfig}, {}
    config.is_encoder_decoder, config.base_model_tp_plan = False, None
    config.get_text_config, config.to_diff_dict = lambda self, **_: self, config.to_dict
    config.__iter__ = lambda self: iter(vars(self))
    model.config_class, model._can_record_outputs = config, None
    model._supports_sdpa = model._supports_attention_backend = True
    model._supports_flash_attn = model._supports_flex_attn = False
    model._can_set_experts_implementation = model._can_set_attn_implementation = lambda: False
    model._tied_weights_keys = model._no_split_modules = None
    model._keep_in_fp32_modules = model._keep_in_fp32_modules_strict = set()
    model._from_config = classmethod(lambda cls, config, **_: cls(config))
    ours.ChameleonImageProcessor.valid_kwargs = transformers.processing_utils.ImagesKwargs

    # Where a test asks for what is an error here. Their first code is 10, ours are 0..K-1; and
    # their vocabulary names each id, so that it could not be cut.
    def numbered(config: object) -> None:
        names, codes = config.vocabulary_map or {}, map(tokenizer.image_token_name, range(99))
        config.vocabulary_map = {next(codes) if name.startswith("IMGIMG") else name: names[name]
                                 for name in sorted(names, key=names.get) if len(name) > 1}
        checked(config)

    checked, config.__post_init__ = config.__post_init__, numbered
    # Their random ids contain <image>, without a picture.
    fill = ours.ChameleonModel.replace_image_placeholders
    ours.ChameleonModel.replace_image_placeholders = lambda self, ids, pixels: (
        ids if pixels is None else fill(self, ids, pixels))
    # A missing tensor is an error, so the report on loading is empty.
    load = model.from_pretrained.__func__
    model.from_pretrained = classmethod(lambda *a, output_loading_info=False, **b: (
        (load(*a, **b), defaultdict(set)) if output_loading_info else load(*a, **b)))

    for name in SWAPPED:
        for module in (transformers, transformers.models.chameleon):
            setattr(module, name, getattr(ours, name))
    transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES["chameleon"] = {
        "pil": "ChameleonImageProcessor"}


class Outcomes(dict):
    """A pytest plugin: (file, test) -> passed, failed or skipped; failed if a subtest did."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = Path(report.fspath).name, report.nodeid
        if self.get(test) != "failed" and (report.when == "call" or not report.passed):
            self[test] = report.outcome


def main(arguments: list[str]) -> int:
    tree, theirs = Path(arguments[0]).resolve(), "--theirs" in arguments
    sys.path.insert(0, str(tree))
    for name, mixin in OUTSIDE.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))
    if not theirs:
        swap()
    folder, outcomes = tree / "tests" / "models" / "chameleon", Outcomes()
    files = [str(folder / f"test_{name}_chameleon.py") for name in FILES]
    options = [f"--rootdir={tree}", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-rfE",
               "--tb=native"]
    options += [a for a in arguments[1:] if a != "--theirs"]
    code = pytest.main([*options, *files], [outcomes])
    for file in files:
        counts = Counter(what for (name, _), what in outcomes.items() if name == Path(file).name)
        print(f"{Path(file).name:40} {counts['passed']:4} passed {counts['failed']:4} failed "
              f"{counts['skipped']:4} skipped")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
