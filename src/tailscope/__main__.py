"""The command line as a module: `python -m tailscope`."""

from tailscope.cli import main

if __name__ == "__main__":
    main()
