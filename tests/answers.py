"""Quick answers about HDF5 files: by forks of one interpreter, in the place of the programs that `ddml.hdf5` starts."""

import json
import os
import sys
from functools import cache

HERE = os.path.abspath(__file__)
sys.path.insert(0, os.path.dirname(HERE))  # -I leaves it out
import forked  # noqa: E402


@cache
def command() -> list[str]:
    """In the place of `ddml.hdf5.command`."""
    return [sys.executable, "-I", "-S", HERE, forked.started(HERE, "serve")]


def become(request: dict[str, object]) -> None:
    """Answer one question."""
    sys.argv = [HERE, *request["arguments"]]  # type: ignore[misc]
    hdf5_child.main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
        from ddml import hdf5_child

        forked.serve(sys.argv[2], become)
    else:
        sys.exit(forked.ask(sys.argv[1], sys.argv[2:], json.loads(sys.argv[2])["descriptor"]))
