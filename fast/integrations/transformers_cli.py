"""Run the command of transformers in a process that knows packed models.

    python -m littlebit.fast.integrations.transformers_cli serve out

A process must import `littlebit.fast` before transformers loads a packed model. The command `transformers` alone does
not, and would serve a dense model of random numbers.
"""

from importlib.metadata import EntryPoint, distribution


def command() -> EntryPoint:
    """Find the command of transformers where its package says.

    Raises
    ------
    ImportError
        If transformers is not installed.
    """
    scripts = distribution("transformers").entry_points.select(group="console_scripts", name="transformers")
    return next(iter(scripts))


if __name__ == "__main__":
    command().load()()
