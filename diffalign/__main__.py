"""`python -m diffalign`, and so `accelerate launch -m diffalign train ...`."""

from diffalign.cli import main

if __name__ == "__main__":
    main()
