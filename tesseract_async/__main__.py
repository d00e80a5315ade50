"""``python -m tesseract_async`` is the command `tesseract`, also where no scripts are installed."""

from tesseract_async.cli.main import main

main(prog_name="tesseract")
