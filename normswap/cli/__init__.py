"""The command line: parse, call the library, print. Results on stdout, progress and errors on stderr.

Exit status 0 done, 1 the answer is "no", 2 cannot. torch, timm and rich are imported when a command runs, so that
`--help` costs nothing.
"""

import click

from normswap import __version__
from normswap.cli.calibrate import calibrate_command
from normswap.cli.convert import convert_command
from normswap.cli.finetune import finetune_command
from normswap.cli.identify import identify_command
from normswap.cli.inspect import inspect_command
from normswap.cli.launched import LauncherAwareGroup
from normswap.cli.printable import make_output_printable
from normswap.cli.recipes import recipes_command
from normswap.cli.verify import verify_command


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
