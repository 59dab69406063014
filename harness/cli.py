"""The command line: find the verb, parse, call, print.

Every verb takes ``--json`` (one JSON object on stdout and nothing else) and ``--help`` with an example.
An error is one line on stderr; its exit code says what kind it is (see `harness.errors`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from harness.commands import Outcome
from harness.errors import HarnessError, UsageError, storage_fault
from harness.terminal import INTERRUPTED, STOPPED, give_up, json_text, keyboard, open_streams, shown, tell

VERBS = {
    "train": "start a run, or continue it when its folder holds a checkpoint",
    "fetch": "bring a run from an object store into a folder, to verify it there",
    "verify": "check a checkpoint or a run: signatures, files, digests, statements, lineage, log",
    "gate": "let models through only if they verify: for CI, commit hooks, deployment",
    "show": "what made this checkpoint, in one screen",
    "diff": "compare two checkpoints or two runs",
    "lineage": "the graph of checkpoints, resumes and parents",
    "export": "a checkpoint's weights as a Hugging Face folder, provenance carried along",
    "merge": "the weighted sum of several checkpoints as one signed folder",
    "kernels": "the ledger of nondeterministic kernels",
    "report": "a research report of one or more runs, with curves and checked claims",
    "replay": "execute steps again, compare every digest, sign the verdict",
    "evaluate": "the held-out measures of checkpoints, kept and signed",
    "prepare": "raw files to token shards with a signed manifest, resumable",
    "sweep": "several seeds and variants of a config, then the report",
    "watch": "a live view of a run from its files",
    "attest": "add a signed statement to a checkpoint: evaluation, verdict, countersignature",
    "head": "the head of a run's log, to be kept outside; verify --head finds rollback and rewriting",
    "keys": "make and show signing identities",
    "policy": "make a policy of who may sign what, or check one",
    "config": "the resolved config and where each value came from",
    "plan": "parameters, memory, tokens and checkpoint bytes of a run, before it starts",
    "doctor": "what this machine can do, and what is wrong with it",
}

_PLACES = ("out", "target", "rerun")
"""Options that say where a verb writes to."""


class _Parser(argparse.ArgumentParser):
    """Tells what it does not understand as every other error is told."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    parser = _Parser(
        prog="harness",
        description="Training whose checkpoints can prove where they came from.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
        + "\n\n`harness VERB --help` shows the options and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("verb", metavar="VERB", nargs="?", choices=list(VERBS))
    return parser


def _verb_parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"harness {verb}",
        description=(module.__doc__ or VERBS[verb]).strip(),
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (``sys.argv[1:]`` by default) and return the exit code."""
    open_streams()
    with keyboard():
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        except KeyboardInterrupt:
            tell(STOPPED, sys.stderr)
            return INTERRUPTED


def _main(words: list[str]) -> int:
    try:
        return _parsed(words)
    except UsageError as error:
        return _failed(error, "--json" in words)


def _parsed(words: list[str]) -> int:
    """Parse ``words`` and call the verb. Raises `UsageError` for what cannot be parsed."""
    if not words or words[0] not in VERBS:
        options = _overview().parse_args(words)
        if options.version:
            import harness

            return _answered(f"harness {harness.__version__}", 0)
        _overview().print_help()
        return 0
    verb, rest = words[0], words[1:]
    module = importlib.import_module(f"harness.commands.{verb}")
    parser = _verb_parser(verb, module)
    # So that key=value may follow an option; argparse cannot do that where a verb has actions.
    options = parser.parse_args(rest) if verb in ("keys", "policy") else parser.parse_intermixed_args(rest)
    return _call(module, options)


def _call(module: ModuleType, options: argparse.Namespace) -> int:
    verb = module.__name__.rpartition(".")[2]
    try:
        outcome: Outcome = module.run(options)
    except HarnessError as error:
        if isinstance(error, UsageError) and not (error.remedy or error.usual_remedy):
            error.remedy = f"see `harness {verb} --help`"
        return _failed(error, options.json)
    except OSError as error:
        # What a verb expects of the disk it says itself. The rest is the machine's all the same: exit code 1
        # would say that evidence is wrong.
        doing = f"running harness {verb}"
        place = next((value for name in _PLACES if (value := getattr(options, name, None))), Path())
        return _failed(storage_fault(error, doing, place), options.json)
    if outcome.silent:
        return outcome.exit_code
    return _answered(json_text(outcome.document) if options.json else shown(outcome.text), outcome.exit_code)


def _answered(text: str, exit_code: int) -> int:
    """Print ``text`` and return ``exit_code``; that of a disk that is full where there is nothing worse."""
    try:
        if text:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        give_up(sys.stdout)  # head or less has read enough
    except OSError as error:
        give_up(sys.stdout)
        fault = _failed(storage_fault(error, "writing the answer", "stdout"), as_json=False)
        return exit_code or fault
    return exit_code


def _failed(error: HarnessError, as_json: bool) -> int:
    if error.silent:
        return error.exit_code
    error.remedy = error.remedy or error.usual_remedy
    if as_json:
        fields = {"what": error.what, "where": error.where, "remedy": error.remedy}
        _answered(json_text({"error": fields, "exit_code": error.exit_code}), error.exit_code)
    tell(f"harness: {error}", sys.stderr)
    return error.exit_code
