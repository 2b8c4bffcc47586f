"""Check that the files of a dense model hold exactly the model's tensors; transformers only logs what is missing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.untrusted import CheckpointError

#: Prefix that a wrapper adds to the names of tensors -> the wrapper, and how to save the model inside it.
WRAPPERS = {
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "module.": "DataParallel or DDP: save model.module",
    "base_model.model.": "PEFT: save model.merge_and_unload()",
    "_forward_module.": "Fabric: save model.module",
    "_fsdp_wrapped_module.": "FSDP: save its full state dict",
}


def check_complete(source: Path | str, found: Mapping[str, Any]) -> None:
    """Check transformers' loading report: no tensor is missing, left over or of the wrong shape.

    Parameters
    ----------
    source : Path or str
        The folder or file that the model comes from.
    found : mapping
        The second value that `from_pretrained(..., output_loading_info=True)` returns.

    Raises
    ------
    CheckpointError
        If the report is not clean; the message names the first tensors and the likely cause.
    """
    missing, left = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = []
    for verb, names in (("is missing", missing), ("is left over", left)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            wrong.append(f"tensor {names[0]}{more} {verb}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        wrong.append(f"tensor {name} must be {tuple(wanted)}, got {tuple(stored)}")
    if not wrong:
        return
    advice = "copy or download it again, or mend config.json"
    for prefix, wrapper in WRAPPERS.items():
        if left and all(name.startswith(prefix) or f".{prefix}" in name for name in left):
            advice = f"the names have {prefix!r} of a wrapper ({wrapper})"
    if any(".lora_" in name for name in left):
        advice = "it holds a LoRA adapter that is not merged: merge it (merge_and_unload) and save the result"
    if missing == ["lm_head.weight"]:
        advice = "if the head is the embedding, set tie_word_embeddings to true in config.json"
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise CheckpointError(
        f"{source} does not fit the model that its configuration describes: {'; '.join(wrong[:3])}{more}; {advice}"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]
