"""Let pytest run the laws: `pytest --pyargs littlebit.conformance --backend MODULE`.

pytest loads this module in every run of every project, so it imports nothing and adds no option unless the laws are
asked for.
"""

from pathlib import Path

HERE = Path(__file__).parent


def asks_for_laws(argument: str) -> bool:
    """Tell whether a command-line argument names this package, or its folder."""
    name = argument.split("::")[0]
    return name == "littlebit.conformance" or (Path(name).is_dir() and Path(name).resolve() == HERE)


def pytest_load_initial_conftests(early_config, args) -> None:
    """Register the options, the laws and the report, if the laws are asked for."""
    if any(map(asks_for_laws, args)):
        early_config.pluginmanager.import_plugin("littlebit.conformance.session")
