from modelathe.entry import start


def main() -> None:
    start("optimize")


if __name__ == "__main__":
    main()
