"""Run `make batch-dependence`."""

from benchmarks.finetuning.batch_dependence.run import main

main()
