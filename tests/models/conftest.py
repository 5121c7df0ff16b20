"""Which tests of families the plain suite leaves to `make test-all`."""

import pytest

# What families take from their frame as it is: these heads are compared with PyTorch's in the
# plain suite for the family that the frame was written for.
LABEL_HEADS = {
    "token_classification",
    "question_answering",
    "multiple_choice",
    "next_sentence_prediction",
    "sequence_classification",
    "audio_frame_classification",
    "xvector",
}
# Whose parts are other families', and whose own layers have tests in its own file.
COMPOSED = {"fusion"}
FRAMES = {f"test_models_{name}.py" for name in ("bert", "gpt2", "llama", "bart", "t5")}


def pytest_collection_modifyitems(items):
    for item in items:
        if "published" in item.function.__name__:  # which change only with the tables of variants
            item.add_marker(pytest.mark.slow)
        callspec = getattr(item, "callspec", None)  # of parametrized tests only
        if callspec is None or item.path.name in FRAMES:
            continue
        if callspec.params.get("name") in COMPOSED:
            item.add_marker(pytest.mark.slow)
        # That a scan is the loop is seen for every family's blocks, and its cache for the frames'.
        if callspec.params.get("head") in LABEL_HEADS or callspec.params == {"scan": True}:
            item.add_marker(pytest.mark.slow)
