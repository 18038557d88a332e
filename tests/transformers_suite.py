"""transformers' own tests of its Chameleon, run on this implementation instead.

    python tests/transformers_suite.py ~/transformers           # a checkout of transformers
    python tests/transformers_suite.py ~/transformers --theirs  # the same tests on their classes

The checkout's version must be the installed one's; its tests also need `parameterized` and
`requests`. Options behind these are pytest's. Printed are the failures, and passed and failed for
each file. Nothing of transformers is copied: names are swapped before its test files are imported.
"""

import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("modeling", "image_processing", "processing")
# The mixins for subjects outside this project, which only a checkout has, not the source archive.
OUTSIDE = {"tests.generation.test_utils": "GenerationTesterMixin",
           "tests.exporters.test_export": "ExportTesterMixin"}


def swap() -> None:
    """Puts our classes where transformers' tests look for its own; the adapter holds names only."""
    import_module("tests.test_configuration_common")  # it loads transformers a second time
    import transformers
    from transformers.models import auto

    sys.path.insert(0, str(ROOT))
    ours = import_module("chameleon")

    class Config(ours.ChameleonConfig):
        """Made as transformers makes one: a keyword that is no field becomes an attribute."""

        is_encoder_decoder, sub_configs = False, {"vq_config": ours.ChameleonVQVAEConfig}

        def __init__(self, **values) -> None:
            vars(self).update(vars(ours.ChameleonConfig.from_dict(values)))

        def get_text_config(self, **_) -> "Config":
            return self

    class Names:
        """What the tests read of a class to learn what it can do."""

        _supports_sdpa = _supports_attention_backend = True
        _supports_flash_attn = _can_set_experts_implementation = False
        _supports_flex_attn = False
        _tied_weights_keys = _no_split_modules = _keep_in_fp32_modules = None
        _keep_in_fp32_modules_strict = None
        config_class = Config

    for cls in (ours.ChameleonModel, ours.ChameleonForConditionalGeneration):
        for name in vars(Names).keys() - vars(object).keys() - {"__module__", "__dict__"}:
            setattr(cls, name, getattr(Names, name))
    ours.ChameleonImageProcessor.valid_kwargs = transformers.processing_utils.ImagesKwargs
    ours.ChameleonProcessor.get_attributes = staticmethod(lambda: ["image_processor", "tokenizer"])
    ours.ChameleonConfig = Config
    for name in ("ChameleonConfig", "ChameleonVQVAEConfig", "ChameleonModel",
                 "ChameleonForConditionalGeneration", "ChameleonProcessor",
                 "ChameleonImageProcessor", "PreTrainedModel"):
        for module in (transformers, transformers.models.chameleon):
            setattr(module, name, getattr(ours, name))
    auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES["chameleon"] = {
        "pil": "ChameleonImageProcessor"}


class Counts:
    """A pytest plugin: how many tests of each file passed, failed and were skipped."""

    def __init__(self) -> None:
        self.files: dict[str, Counter] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if type(report) is not pytest.TestReport:  # one of the subtests
            return
        if report.when == "call" or report.outcome != "passed":
            file = self.files.setdefault(Path(report.fspath).name, Counter())
            file[report.outcome] += 1


def main(arguments: list[str]) -> int:
    tree, theirs = Path(arguments[0]).resolve(), "--theirs" in arguments
    sys.path.insert(0, str(tree))
    if not theirs:
        swap()
    folder, counts = tree / "tests" / "models" / "chameleon", Counts()
    files = [str(folder / f"test_{name}_chameleon.py") for name in FILES]
    code = pytest.main([f"--rootdir={tree}", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-rfE",
                        *files, *(a for a in arguments[1:] if a != "--theirs")], [counts])
    for name, count in counts.files.items():
        print(f"{name:40} {count['passed']:4} passed {count['failed']:4} failed "
              f"{count['skipped']:4} skipped")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
