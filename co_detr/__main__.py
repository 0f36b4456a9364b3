"""`python -m co_detr` is the command `co-detr`."""

from co_detr.command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
