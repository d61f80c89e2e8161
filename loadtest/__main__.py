from modelathe.entry import start


def main() -> None:
    start("loadtest")


if __name__ == "__main__":
    main()
