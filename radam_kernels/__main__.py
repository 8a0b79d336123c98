"""The command line: `python -m radam_kernels doctor` and `python -m radam_kernels train`."""

import argparse
import sys

from . import doctor, train


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radam_kernels", description="Rectified Adam as fused kernels."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for module, name, text in (
        (train, "train", "train a small transformer under this RAdam, torch's RAdam and Adam"),
        (doctor, "doctor", "tell which backends work here, and why others do not"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args()
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
