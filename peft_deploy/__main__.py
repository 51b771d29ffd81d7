"""``python -m peft_deploy``."""

from peft_deploy.cli import main

if __name__ == "__main__":
    main()
