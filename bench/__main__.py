"""`python -m bench {report,publish,profile,gpu}`: see bench/README.md, or add --help."""

import sys
from importlib import import_module

COMMANDS = {
    "report": ("bench.report", "measure steps on this machine"),
    "publish": ("bench.pages", "write the pages that show the results"),
    "profile": ("bench.profiling", "show where the time of a step goes"),
    "gpu": ("bench.gpu.stages", "everything that needs a GPU, in stages"),
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        usage = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
        print(f"usage: python -m bench COMMAND ...\n\n{usage}", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    return import_module(COMMANDS[name][0]).main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
