"""Has the TPU compiler write the bundles of all operations of a program, for absent TPUs too.

    text, codes = dumped(compile_step, "v5p:2x2x1")
    whole(codes["fusion.7"]).run.bundles

libtpu reads its flags once, when it is loaded, and ends the process if it fails: therefore the
program is compiled in a process of its own.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from pallas_kernels.compile.bundles import Code, parse_code
from pallas_kernels.compile.errors import CompilerError

# Operations with the same code would otherwise be written once, under the name of one of them.
_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.* --xla_jf_hlo_deduplication_all_unique=true"
)
_BUNDLES = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_UTILIZATION = re.compile(r"\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt")
TOP = "TLP"  # the code of the program itself, which calls the others


def dumped[T](compile_program: Callable[..., T], *arguments) -> tuple[T, dict[str, Code]]:
    """Calls a function in a new process, and reads the bundles of the program that it compiles.

    Args:
        compile_program: a function of a module, which compiles one program and returns what can be
            pickled, such as the optimized HLO as text.
        *arguments: its arguments, which can be pickled.

    Returns:
        What the function returns, and the code of each HLO instruction that has its own, by name;
        `TOP` is the code of the program that calls them.

    Raises:
        CompilerError: if the compiler fails or writes nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = _in_child(folder, functools.partial(compile_program, *arguments))
        bundles, utilization = (_named(folder, x) for x in (_BUNDLES, _UTILIZATION))
        if TOP not in bundles:
            raise CompilerError("libtpu wrote no bundles: it serves this with libtpu 0.0.48 only.")
        codes = {
            name: parse_code(file.read_text(), utilization[name].read_text())
            for name, file in bundles.items()
        }
    return result, codes


def _in_child[T](folder: str, call: Callable[[], T]) -> T:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, context, initializer=_set_flags, initargs=(folder,)
    ) as pool:
        try:
            return pool.submit(call).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise CompilerError("libtpu ended the process that compiled the program.") from error


def _set_flags(folder: str) -> None:
    """Sets the flags of a process that has not loaded libtpu."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", ""), _FLAGS.format(folder=folder)
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()


def _named(folder: str, pattern: re.Pattern) -> dict[str, Path]:
    """The files whose name matches, by the HLO instruction; of several of one the last written."""
    found = ((pattern.fullmatch(file.name), file) for file in sorted(Path(folder).iterdir()))
    return {match[1]: file for match, file in found if match}
