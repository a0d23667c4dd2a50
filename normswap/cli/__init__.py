"""The command line: parses options, calls the library, prints. Results on stdout, progress and errors on stderr.

Exit codes: 0 success; 1 nothing to convert or outputs differ; 2 error. torch, timm and rich are imported when a command
runs, so that `--help` is fast.
"""

import click

from normswap import __version__
from normswap.cli.commands.analyze import analyze_command
from normswap.cli.commands.bake import bake_command
from normswap.cli.commands.calibrate import calibrate_command
from normswap.cli.commands.convert import convert_command
from normswap.cli.commands.export import export_command
from normswap.cli.commands.finetune import finetune_command, recipes_command
from normswap.cli.commands.identify import identify_command
from normswap.cli.commands.inspect import inspect_command
from normswap.cli.commands.report import report_command
from normswap.cli.commands.revert import revert_command
from normswap.cli.commands.verify import verify_command
from normswap.cli.console import LauncherAwareGroup, make_output_printable


@click.group(cls=LauncherAwareGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="normswap %(version)s")
def main() -> None:
    """Swap Batch Normalization for Switchable Normalization in trained networks, without changing their function."""
    make_output_printable()


main.add_command(identify_command)
main.add_command(inspect_command)
main.add_command(convert_command)
main.add_command(verify_command)
main.add_command(finetune_command)
main.add_command(recipes_command)
main.add_command(calibrate_command)
main.add_command(bake_command)
main.add_command(revert_command)
main.add_command(analyze_command)
main.add_command(report_command)
main.add_command(export_command)
