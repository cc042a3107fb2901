"""The command: compose the settings with Hydra, check them strictly, run.

    python train.py +experiment=quartet
    python train.py -m +experiment=bf16,quest,quartet

Hydra is known here and nowhere else in the package. Everything heavy is imported when a run starts, so that help and
mistakes are answered at once.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from itertools import pairwise
from string import Template
from typing import NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtrain.config import Config, check_key
from qtrain.config.settings import check_group_option, configs_dir, group_names, parse, shown
from qtrain.errors import (
    LostRankError,
    RefusedError,
    StoppedError,
    UserError,
    explain,
    explain_missing,
    first_line,
    need,
)
from qtrain.training.stop import CODES, STOPPED, end_now, heard, leave_lost_terminal
from qtrain.training.world import find_world, started_by_another

FROM_CHECKPOINT = "model=hf:"
SWEEP_FLAGS = ("--jobs", "--only", "--retry")


def main() -> None:
    """What train.py and `qtrain train` do. Exit codes: 0 done, 2 a mistake in what was asked or a run that could not go
    on, 130 stopped by Ctrl-C, SIGTERM or SIGHUP, 75 stopped by SIGUSR1 or SIGUSR2, or since another process of the run
    ended. After 130 and 75 the same command continues; 75 (EX_TEMPFAIL) asks a scheduler to queue it again."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on: what they look like is decided here
    for noted in (_failures, _jobs, _failed_jobs):  # by an earlier call in this process
        noted.clear()
    if sys.argv[1:] == ["--version"]:
        print(f"qtrain {version('qtrain')}")
        return
    try:
        if not _asks_for_several(sys.argv[1:]):
            _check_one_run(sys.argv[1:])
        sys.argv[1:] = checked_overrides(sys.argv[1:])
        with _stop.listening():
            jobs = _jobs_asked_for(sys.argv[1:])
            if jobs == [[]]:
                raise UserError(
                    "-m makes a run of each combination of the values that settings list, and none are listed: add "
                    "some, as recipe=bf16,quartet seed=0,1, or leave -m out"
                )
            _jobs.extend(jobs)
            if jobs:
                from qtrain.multirun import announce

                announce(jobs)
            try:
                _hydra_main()
            except JobFailedError as error:
                _failures.append(error)
            if jobs and not _stop.asked:
                _show_outcomes(jobs)
    except RefusedError as error:  # rank 0 has said why
        _failures.append(error)
        if started_by_another():
            _failures.clear()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _report(error)
    except ValueError as error:
        if not _is_of_hydra(error):
            raise
        _report(error)
    except OSError as error:
        if error.errno is None:
            raise
        _report(explain(error))
    except KeyboardInterrupt as stopped:
        _end_stopped(stopped)
    except Exception as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        _report(UserError(f"the jobs were not submitted: {' '.join(str(error).split())}"))
    if _failures:
        sys.exit(2)


GOES_ON = "the same command continues from the last checkpoint"

_failures: list[Exception] = []
_jobs: list[list[str]] = []  # of a multirun, in their order
_failed_jobs: dict[frozenset[str], str] = {}  # those that failed in this process, with their reason in one line


def _end_stopped(stopped: KeyboardInterrupt) -> NoReturn:
    """A process that another of the run has started ends with 0 when both were stopped: a code tells its starter that
    something is wrong."""
    why = f"another process of this run is lost ({stopped.how})" if isinstance(stopped, LostRankError) else "stopped"
    if started_by_another() and why == "stopped":
        sys.exit(0)
    print(f"{why}; {GOES_ON}", file=sys.stderr)
    sys.exit(stopped.exit_code if isinstance(stopped, StoppedError) else 130)


class JobFailedError(Exception):
    """A job of a multirun failed in a process of its own, and has said why. Hydra hands it on when all jobs of the
    multirun have ended."""


class _Stop:
    """Being asked to stop while no run listens for itself (`qtrain.training.stop`): there is nothing to save, so the
    process ends at once. An exception would pass through imports, and some code there would catch it.

    The parent of hydra/launcher=local has runs in other processes. Ctrl-C reaches these as well, SIGTERM the parent
    alone, who hands it on. joblib kills them all at the first exception, its own or a job's: so the parent waits until
    each has saved, and a job that was stopped ends without one.
    """

    def __init__(self) -> None:
        self.asked = 0  # or the exit code
        self.stopped: KeyboardInterrupt | None = None  # how a job ended

    @contextmanager
    def listening(self) -> Iterator[None]:
        """StoppedError when asked to stop while other processes have runs: at the end, or when asked again."""
        before = {number: signal.signal(number, self._note) for number in heard()}
        try:
            yield
        except Exception:
            if not self.asked:  # else joblib's, of a process that Ctrl-C ended before it had a job
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped or self.asked:
            raise self.stopped or StoppedError(self.asked)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            leave_lost_terminal()
        others, code = multiprocessing.active_children(), CODES[signal.Signals(number)]
        if not others:
            os.write(2, f"stopped; {GOES_ON}\n".encode())
            end_now(code)
        if self.asked:
            raise StoppedError(self.asked)
        self.asked = code
        if number != signal.SIGINT:
            for process in others:
                os.kill(process.pid, signal.SIGINT if number == signal.SIGTERM else number)  # pyright: ignore[reportArgumentType]
        print("waiting until all jobs have saved; again to stop at once", file=sys.stderr)


_stop = _Stop()


def _is_of_hydra(error: BaseException) -> bool:
    """Whether Hydra itself has raised an error: plain ones too, for a flag or a value that it does not take."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("hydra.")


def _report(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    _failures.append(error)


# Arithmetic for rules that follow from the size of a model: optimizer.lr: ${div:0.256,${model.dim}}
OmegaConf.register_new_resolver("div", lambda a, b: a / b, replace=True)


def _sequences(most: int, *, _root_: DictConfig) -> int:
    """The most sequences a forward, up to `most`, that the batch of a step splits into; `most` where the length of a
    sequence is not known, since it stands in a checkpoint. The number of devices does not count: a run goes on with
    another one."""
    batch, length = (OmegaConf.select(_root_, key) for key in ("trainer.batch_tokens", "model.seq_len"))
    if not (isinstance(batch, int) and isinstance(length, int) and length > 0):
        return most
    return next((n for n in range(most, 0, -1) if batch % (n * length) == 0), 1)


OmegaConf.register_new_resolver("sequences", _sequences, replace=True)


@hydra.main(config_path=str(configs_dir()), config_name="train", version_base="1.3")
def _hydra_main(tree: DictConfig) -> float | None:
    from qtrain.train import job  # joblib sends this function by value, and with it copies of what is global in it

    return job(tree)


def _asks_for_several(arguments: Sequence[str]) -> bool:
    """Whether several values of a setting are several runs: asked for, or said by a file of configs/sweep."""
    several = ("-m", "--multirun", "hydra.mode=MULTIRUN")
    return any(argument in several or argument.lstrip("+").startswith("sweep=") for argument in arguments)


def _jobs_asked_for(arguments: Sequence[str]) -> list[list[str]]:
    """The jobs of a multirun; none where one run is asked for."""
    if not _asks_for_several(arguments):
        return []
    return [] if {"--help", "-h", "--cfg", "-c", "--info", "-i"} & {*arguments} else jobs_of(arguments)


def _show_outcomes(jobs: Sequence[Sequence[str]]) -> None:
    """The table that a multirun ends with; of a dry run none."""
    from rich.console import Console

    from qtrain.multirun import closing_lines, outcome_table, outcomes

    configs: list[Config | UserError] = []
    for job in jobs:
        try:
            configs += compose_all([job])
        except UserError as error:
            configs.append(error)
    if any(isinstance(config, Config) and config.dry_run for config in configs):
        return
    try:
        found = outcomes(jobs, configs, _failed_jobs)
    except UserError as error:
        _report(error)
        return
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print()
    console.print(outcome_table(found))
    console.print("\n".join(closing_lines(found)), soft_wrap=True)


def job(tree: DictConfig) -> float | None:
    """One job, unless its process was asked to stop."""
    if multiprocessing.parent_process() is None:
        return _job(tree)
    from qtrain.runs.processes import end_with_parent

    parent_lives = end_with_parent(signal.SIGTERM)  # which saves first
    for number in heard():  # as Ctrl-C: a run that listens takes them over, and hands on what it has heard
        if CODES[number] == STOPPED:
            signal.signal(number, signal.default_int_handler)
    try:  # a process of hydra/launcher=local
        if _stop.stopped or _stop.asked:
            return None
        from qtrain.multirun import labelled

        number = _number()
        with nullcontext() if number is None else labelled(f"job {number + 1}"):  # the lines of others come between
            return _job(tree)
    except KeyboardInterrupt as stopped:
        if not parent_lives():
            code = stopped.exit_code if isinstance(stopped, StoppedError) else 130
            os._exit(code)  # joblib would wait for a next job
        _stop.stopped = stopped
        return None


def _number() -> int | None:
    """Of the job of a multirun, from 0."""
    is_one_of_several = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return int(HydraConfig.get().job.num) if is_one_of_several else None


def _job(tree: DictConfig) -> float | None:
    """A mistake is reported, and so is whatever ends one job of a multirun: the next ones go on."""
    number = _number()
    several = number is not None
    if number is not None:
        from qtrain.multirun import heading

        if (told := heading(number)) is not None:
            print("" if multiprocessing.parent_process() else "\n", told, sep="", flush=True)
    try:
        config = to_config(tree)
        if several and not config.dry_run and find_world(config.trainer).starts_others:
            raise UserError(
                "the runs of one command (-m) cannot each start processes of their own; start it with torchrun or "
                "srun, or one run at a time"
            )
        from qtrain.runs.directory import RunDirectory
        from qtrain.training.session import run

        loss = run(config)
        was_trained = loss is not None and RunDirectory.of(config).path.exists()  # else a row was found
        if was_trained and not several:
            print(next_commands(config))
        return loss
    except RefusedError as error:
        if not several:
            raise
        _note_failure(error, several)
    except (UserError, OmegaConfBaseException) as error:
        _note_failure(error, several)
        _report(error)
    except ModuleNotFoundError as error:
        _note_failure(error, several)
        _report(explain_missing(error))
    except Exception as error:
        _note_failure(error, several)
        if isinstance(error, OSError) and error.errno is not None:
            _report(explain(error))
        elif not several:
            raise
        else:
            traceback.print_exc()
    if several and (multiprocessing.parent_process() is not None or not _jobs):  # in a process of its own
        raise JobFailedError
    return None


def _note_failure(error: Exception, several: bool) -> None:
    if several:
        _failures.append(error)
        told = str(error) if isinstance(error, UserError) else first_line(error)
        from qtrain.multirun import typed_job

        _failed_jobs[typed_job(HydraConfig.get().overrides.task)] = told


def next_commands(config: Config) -> str:
    """What a newcomer wants after a run. The commands that need the repository are named only there."""
    from qtrain.multirun import command_words, in_repository
    from qtrain.runs.directory import RunDirectory

    path = str(RunDirectory.of(config).path)
    compare = "qtrain train -m +experiment=bf16,quartet,quest_2bit,halo_0_fp4 trainer.tokens=524_288"
    report, generate = (shlex.join([*command_words(name), path]) for name in ("report", "generate"))
    commands = [
        ("make compare", "recipes whose losses differ, and the page that shows it")
        if in_repository()
        else (compare, "recipes whose losses differ"),
        (f"{report} --out report.html", "this run on one page: loss, speed, how every layer's quantisers fare"),
        (f"{generate} --prompt 'def '", "text of the model"),
        (f'python -c "import qtrain; print(qtrain.load_run({path!r}))"', "the numerics of every layer"),
    ]
    width = max(len(command) for command, _ in commands)
    return "\n".join(["", "next:", *(f"  {command:<{width}}   {purpose}" for command, purpose in commands)])


def to_config(tree: DictConfig) -> Config:
    """A composed tree -> checked settings, with trainer.precision=auto replaced by what it is on this machine."""
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    config = parse(Config, {str(key): value for key, value in plain.items()})
    from qtrain.plan import resolve_precision  # and with it torch, once there are no mistakes left to be answered

    return resolve_precision(config)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The settings that `python train.py <overrides>` would run, for programs and tests."""
    _check_one_run(overrides)
    (config,) = compose_all([overrides])
    return config


def compose_all(jobs: Iterable[Sequence[str]]) -> list[Config]:
    """The settings of each job, in their order. Jobs that differ in values alone are composed once: Hydra takes 0.15 s
    for each, and a sweep may have hundreds."""
    parse = OverridesParser.create().parse_override
    trees: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    with _composing():
        for overrides in jobs:
            checked = checked_overrides(overrides)
            parts = tuple(override for override in checked if not override.startswith("++"))
            if parts not in trees:
                trees[parts] = hydra.compose("train", overrides=list(parts))
            tree = copy.deepcopy(trees[parts])
            for override in map(parse, (override for override in checked if override.startswith("++"))):
                OmegaConf.update(tree, override.key_or_group, override.value(), merge=True, force_add=True)
            configs.append(to_config(tree))
    return configs


@contextmanager
def _composing() -> Iterator[None]:
    """Hydra for programs. What it finds wrong with the settings is a UserError."""
    try:
        with hydra.initialize_config_dir(str(configs_dir()), version_base="1.3"):
            yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if isinstance(error, UserError) or not (
            isinstance(error, HydraException | OmegaConfBaseException) or _is_of_hydra(error)
        ):
            raise
        raise UserError(str(error)) from None


def checked_overrides(arguments: Iterable[str]) -> list[str]:
    """The arguments for Hydra. UserError for a key or a group option that does not exist, with the nearest one, and for
    a flag that Hydra does not have.

    A known key gets Hydra's add-or-override prefix (++), so that a setting which the chosen file leaves at its default
    is set like any other. Left to itself, Hydra would advise a + before an unknown key, ask for one before a known
    key that the file does not mention, and meet a wrong option of a sweep only when that job's turn comes.
    """
    arguments = from_checkpoint(list(arguments))
    _check_flags(arguments)
    _check_words(arguments)
    own_configs = any(argument.split("=")[0] in ("--config-dir", "-cd", "hydra.searchpath") for argument in arguments)
    flags = [argument for argument in arguments if not _is_override(argument)]  # first: Hydra takes them in one piece
    return flags + [_checked(argument, own_configs) for argument in arguments if _is_override(argument)]


def _check_words(arguments: Sequence[str]) -> None:
    """UserError for a word that is neither a setting nor a flag nor the value of one."""
    takes_value = {
        option for action in get_args_parser()._actions if action.nargs != 0 for option in action.option_strings
    }
    for before, word in pairwise(["", *arguments]):
        if word.startswith("-") or _is_override(word) or before in takes_value:
            continue
        advice = f", as +experiment={word}" if word in group_names("experiment") else ""
        if _is_override(before):
            key, _, value = before.partition("=")
            both = _quoted(key, f"{value} {word}")
            advice = f"; if it belongs to {before}, one text is {both}, and a list {key}=[{value},{word}]"
        raise UserError(f"{shown(word)} is no setting: write key=value{advice}")


def _check_flags(arguments: Sequence[str]) -> None:
    """UserError for a flag that Hydra's parser does not have: a setting written as one, or a flag of `qtrain sweep`."""
    known = [option for action in get_args_parser()._actions for option in action.option_strings]
    for flag, after in pairwise([*arguments, ""]):
        word, equals, value = flag.partition("=")
        short = not flag.startswith("--")
        if not flag.startswith("-") or word in known:  # in full: --experiment would be short for --experimental-rerun
            continue
        if short and any(word.startswith(option) for option in known):  # -cjob for -c job
            continue
        if word in SWEEP_FLAGS:
            raise UserError(
                f"unknown flag {shown(word)}: {word} is `qtrain sweep`'s; `qtrain sweep --help` explains it"
            )
        key = word.lstrip("-").replace("-", "_")
        if not equals:
            is_switch = key in Config.model_fields and Config.model_fields[key].annotation is bool
            value = "true" if is_switch else "..." if after.startswith("-") or "=" in after else after or "..."
        plus = "+" if key in ("experiment", "sweep") else ""  # what configs/train.yaml does not list
        raise UserError(f"unknown flag {shown(word)}: settings have no dashes{_as_setting(f'{plus}{key}={value}')}")


def _as_setting(argument: str) -> str:
    """The advice to write this instead, or what is wrong with it too."""
    try:
        _checked(argument, own_configs=False)
    except UserError as error:
        return f", as {shown(argument)}: {error}"
    return f": {argument}"


def from_checkpoint(arguments: list[str]) -> list[str]:
    """model=hf:NAME written out: settings and weights of that checkpoint, and its tokenizer where no other is asked
    for."""
    found = next((argument for argument in arguments if argument.startswith(FROM_CHECKPOINT)), None)
    if found is None:
        return arguments
    name = "'" + found.removeprefix(FROM_CHECKPOINT).replace("'", "\\'") + "'"
    parts = ["model=hf", f"model.init_from={name}"]
    if not any(argument.startswith("tokenizer") for argument in arguments):
        parts += ["tokenizer=huggingface", f"tokenizer.path={name}"]
    at = arguments.index(found)
    return [*arguments[:at], *parts, *arguments[at + 1 :]]


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _parsed(argument: str) -> Override:
    try:
        (override,) = OverridesParser.create().parse_overrides([argument])
    except (HydraException, ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets
        raise UserError(f"cannot read {shown(argument)}: {first_line(error)}{_how_to_write(argument)}") from None
    if not override.key_or_group:
        told = "there is no key before the =; write key=value, without spaces around the ="
        raise UserError(f"cannot read {shown(argument)}: {told}")
    return override


def _how_to_write(argument: str) -> str:
    """What to do about an argument that Hydra's grammar does not take."""
    key, _, value = argument.partition("=")
    if key != key.strip() or value != value.lstrip():
        return "; write key=value, without spaces around the ="
    return f"; if the value is text, quote it: {_quoted(key, value)}" if len(value) <= 200 else ""


def _quoted(key: str, value: str) -> str:
    """An override whose value is text of any characters, for a shell."""
    text = value.replace("'", "\\'")
    override = f"{key}='{text}'"
    return shlex.quote(override) if set('"$`!') & set(override) else f'"{override}"'


def _check_one_run(arguments: Iterable[str]) -> None:
    """UserError for a setting of several values, which are several runs."""
    for argument in filter(_is_override, arguments):
        override = _parsed(argument)
        key, value = override.key_or_group, argument.partition("=")[2]
        if not override.is_sweep_override():
            continue
        advice = "several values are several runs, and one is asked for: add -m"
        if not (configs_dir() / key).is_dir() and "(" not in value:
            advice += f"; one list is {key}=[{value}], one text {_quoted(key, value)}"
        raise UserError(f"{argument}: {advice}")


def _checked(argument: str, own_configs: bool) -> str:
    override = _parsed(argument)
    key = override.key_or_group
    if key == "hydra/launcher":
        _check_launcher(override)
    if key.split(".")[0].split("/")[0] == "hydra":
        return argument
    is_group = (configs_dir() / key).is_dir()
    if not is_group:
        check_key(key)
    if override.is_delete():
        what = f"a run needs its {key}; {_known_options(key)}" if is_group else f"set another value: {key}=..."
        raise UserError(f"{argument}: {what}")
    if not is_group:
        return "++" + argument.lstrip("+")
    known = _known_options(key)
    if not override.is_sweep_override() and not isinstance(override.value(), str):
        raise UserError(f"{argument}: {key} is {shown(override.value())}, not the name of a file; {known}")
    if not own_configs:
        for option in _options(override):
            check_group_option(key, option)
    return argument


def _known_options(group: str) -> str:
    return f"give one of configs/{group}: {', '.join(group_names(group))}"


def _check_launcher(override: Override) -> None:
    """UserError where what starts the runs of a multirun is not installed."""
    for option in _options(override):
        if option in ("local", "joblib"):
            need("hydra_plugins.hydra_joblib_launcher", f"hydra/launcher={option}")
        elif option.startswith(("slurm", "submitit")):
            need("hydra_plugins.hydra_submitit_launcher", f"hydra/launcher={option}")
            if option.endswith("slurm") and shutil.which("sbatch") is None:
                raise UserError(
                    f"hydra/launcher={option} submits jobs by sbatch, and there is none here; start it on a machine of "
                    "a SLURM cluster, or take hydra/launcher=local, which runs jobs beside each other on this one"
                )


def _options(override: Override) -> list[str]:
    """The group options that an override names, one or a sweep's several; a glob names only what exists."""
    if not override.is_sweep_override():
        return [str(override.value())]
    if override.is_choice_sweep() and not _is_glob(override):
        return [str(option) for option in override.sweep_string_iterator()]
    return []


def _is_glob(override: Override) -> bool:
    return override.value_type == ValueType.GLOB_CHOICE_SWEEP


def jobs_of(arguments: Sequence[str]) -> list[list[str]]:
    """The jobs that `python train.py -m <arguments>` would run, in its order, each as overrides of `compose`: one for
    each combination of the values that the arguments and hydra.sweeper.params of their config list."""
    arguments = [argument for argument in checked_overrides(arguments) if _is_override(argument)]
    parse = OverridesParser.create().parse_override
    single = [argument for argument in arguments if not parse(argument).is_sweep_override()]
    with _composing():
        tree = hydra.compose("train", overrides=single, return_hydra_config=True)
        params = [f"{key}={value}" for key, value in (tree.hydra.sweeper.params or {}).items()]
        loader = GlobalHydra.instance().config_loader()  # which knows what a glob of options names
        overrides = OverridesParser.create(loader).parse_overrides([*params, *arguments])
        for override in filter(_is_glob, overrides):
            if not [*override.sweep_iterator()]:
                key = override.key_or_group
                those = _known_options(key) if (configs_dir() / key).is_dir() else f"list its values: {key}=...,..."
                typed = str(override.input_line).lstrip("+")
                raise UserError(f"{typed}: no file of configs/{key} fits; {those}")
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return [[override for override in job if not override.startswith("hydra")] for job in jobs]


def help_text(arguments: Sequence[str]) -> str:
    """What --help prints: hydra.help of configs/train.yaml, with the options of each group, and every setting with its
    meaning, as the arguments set it. Hydra's own reads each config group several times over, for most of a second."""
    from qtrain.config.listing import listing

    with _composing():
        overrides = [argument for argument in checked_overrides(arguments) if _is_override(argument)]
        tree = hydra.compose("train", overrides=overrides, return_hydra_config=True)
    text = OmegaConf.select(tree, "hydra.help.template")
    OmegaConf.set_struct(tree, False)
    del tree["hydra"]
    groups = sorted({str(path.parent.relative_to(configs_dir())) for path in configs_dir().rglob("*.yaml")} - {"."})
    options = {group: [name for name in group_names(group) if "/" not in name] for group in groups}
    parts = [
        textwrap.fill(f"{group}: {', '.join(names)}", 120, subsequent_indent="  ", break_on_hyphens=False)
        for group, names in options.items()
        if not group.startswith("hydra")
    ]
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    return Template(text).substitute(
        APP_CONFIG_GROUPS="\n".join(parts), SETTINGS=listing({str(key): value for key, value in plain.items()})
    )
