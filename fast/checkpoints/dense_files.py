"""Check and list the files of dense models, without importing torch; refuse models that are quantized already."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..files.untrusted import JSON_BYTES, CheckpointError, open_errors, parse_json_object
from .fetch import locate
from .format import INDEX, WEIGHTS, is_official

#: Sections of config.json that other quantization methods write -> the method's name, if the section does not give it.
SECTIONS = {"quantization_config": "another program", "compression_config": "compressed-tensors", "quantization": "mlx"}

#: Files that only one quantization method leaves beside the model -> the method.
FOREIGN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def locate_dense(source: str | Path) -> Path:
    """Return the folder of a dense model, or its GGUF file, without downloading weights.

    Parameters
    ----------
    source : str or Path
        As for `fetch.locate`, or a config.json.

    Raises
    ------
    CheckpointError
        If there is no such model, or it is quantized already.
    """
    path = Path(source)
    found = locate(path.parent if path.name == "config.json" else source, weights=False)
    if found.is_dir():
        check_dense(found, source)
    return found


def check_dense(folder: Path, source: str | Path) -> None:
    """Check, without reading weights, that a folder holds a dense model.

    Raises
    ------
    CheckpointError
        If it holds a packed checkpoint, a model that another method quantized, or an adapter of PEFT.
    """
    config = dense_json(folder / "config.json")
    section = config.get("quantization_config")
    if is_official(folder) or (isinstance(section, dict) and section.get("quant_method") == "littlebit"):
        raise CheckpointError(
            f"{source} is already quantised, by LittleBit: load it with littlebit.fast.load, or take its dense model"
        )
    if method := foreign_method(config) or foreign_files(folder):
        raise CheckpointError(
            f"{source} is already quantised, by {method}: start from the model as it was before that, in 16 or 32 bits"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{source} holds an adapter of PEFT beside the model: merge it (merge_and_unload) and save the result, or "
            "remove adapter_config.json"
        )


def dense_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a dense model, which may be a link to an ordinary file anywhere."""
    try:
        if not file.is_file():
            raise OSError("not an ordinary file")
        with file.open("rb") as opened:
            return parse_json_object(opened.read(JSON_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or download it again") from error


def dense_files(folder: Path) -> list[Path]:
    """List the safetensors files of a dense model; all exist and are as long as their headers say.

    Raises
    ------
    CheckpointError
        If a file is missing or corrupt; the message names it.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        weight_map = dense_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} must have a 'weight_map' of tensors to files; download it again")
        names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if not (folder / name).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            advice = "pickled weights are not read: save the model as safetensors" if pickled else "copy or download it"
            raise CheckpointError(f"{folder} does not hold the whole model: there is no {name}; {advice}")
        with open_errors(folder / name), safe_open(folder / name, framework="numpy"):
            pass  # opening compares the header with the length of the file
    return [folder / name for name in names]


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """Name the method that quantized a model, by its config.json; return None for a dense or packed LittleBit model.

    Parameters
    ----------
    config : mapping
        Content of config.json. The method's section is at its top level or in the part for the text model.

    Examples
    --------
    >>> foreign_method({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    >>> foreign_method({"quantization_config": {"load_in_4bit": True}})
    'bitsandbytes'
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, usual in SECTIONS.items():
        for section in (part[key] for part in parts if part.get(key)):
            if not isinstance(section, dict):
                return usual
            method = section.get("quant_method") or section.get("quant_algo")
            if not method and (section.get("load_in_4bit") or section.get("load_in_8bit")):
                return "bitsandbytes"
            if method != "littlebit":
                return str(method or usual)
    return None


def foreign_files(folder: Path) -> str | None:
    """Name the method that quantized the model in a folder, by a file that only this method writes."""
    return next((method for name, method in FOREIGN_FILES.items() if (folder / name).is_file()), None)
