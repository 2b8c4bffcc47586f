"""Check that a dense checkpoint fills its model, and name what is missing or left over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.untrusted import CheckpointError

#: What wrappers put before the names of a model's tensors, and what to do about them.
WRAPPERS = {
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "module.": "DataParallel or DDP: save model.module",
    "base_model.model.": "PEFT: save model.merge_and_unload()",
    "_forward_module.": "Fabric: save model.module",
    "_fsdp_wrapped_module.": "FSDP: save its full state dict",
}


def check_whole(place: Path | str, found: Mapping[str, Any]) -> None:
    """Check what transformers reports after loading a model: each tensor of the model was read, and each of the files.

    Parameters
    ----------
    place : Path
        The folder or file that the model comes from.
    found : mapping
        What `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises
    ------
    CheckpointError
        If tensors are missing, left over, or of another shape; the first of them are named.
    """
    missing, left = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = []
    for verb, names in (("is missing", missing), ("is left over", left)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            wrong.append(f"tensor {names[0]}{more} {verb}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        wrong.append(f"tensor {name} is {tuple(stored)}, not {tuple(wanted)}")
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
        f"{place} does not fit the model that its configuration describes: {'; '.join(wrong[:3])}{more}; {advice}"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]
