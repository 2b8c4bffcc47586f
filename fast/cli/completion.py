"""Completion of the `littlebit` command in shells, made from its own parser."""

import argparse

SHELLS = ("bash", "zsh", "fish")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's commands."""
    action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """A command's options, those that begin with a dash."""
    return [action for action in parser._actions if action.option_strings]


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script that teaches a shell the command: its commands, their options, and the options' choices; else files.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    shell : str
        "bash", "zsh" or "fish".
    """
    commands = subcommands(parser)
    if shell == "fish":
        return fish(parser.prog, commands)
    words = {
        name: " ".join(text for each in options(sub) for text in each.option_strings) for name, sub in commands.items()
    }
    choices = {
        f"{name} {text}": " ".join(map(str, each.choices))
        for name, sub in commands.items()
        for each in options(sub)
        if each.choices
        for text in each.option_strings
    }
    known = "".join(f'    "{key}") words="{value}" ;;\n' for key, value in choices.items())
    given = "".join(f'    {name}) words="{value}" ;;\n' for name, value in words.items())
    script = f"""_{parser.prog}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command="${{COMP_WORDS[1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$current"))
    return
  fi
  case "$command $previous" in
{known}  esac
  if [ -z "$words" ] && [[ "$current" == -* ]]; then
    case "$command" in
{given}    esac
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current")); fi
}}
complete -o default -F _{parser.prog} {parser.prog}
"""
    return script if shell == "bash" else f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{script}"


def fish(prog: str, commands: dict[str, argparse.ArgumentParser]) -> str:
    """The script for fish."""

    def quoted(text: object) -> str:
        return "'" + str(text).replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = [
        f"complete -c {prog} -n __fish_use_subcommand -a {name} -d {quoted(sub.description)}"
        for name, sub in commands.items()
    ]
    for name, sub in commands.items():
        for each in options(sub):
            names = " ".join(
                f"-l {text[2:]}" if text.startswith("--") else f"-s {text[1:]}" for text in each.option_strings
            )
            values = f" -xa {quoted(' '.join(map(str, each.choices)))}" if each.choices else ""
            lines.append(f"complete -c {prog} -n '__fish_seen_subcommand_from {name}' {names}{values}")
    return "\n".join(lines) + "\n"
