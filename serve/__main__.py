from modelathe.entry import start


def main() -> None:
    start("serve")


if __name__ == "__main__":
    main()
