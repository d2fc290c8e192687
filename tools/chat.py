"""Ask a trained model about images: one question, or a conversation on the terminal."""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run (its --work-dir)")
    parser.add_argument("question", nargs="*", help="questions, asked in turn; none: type them")
    parser.add_argument("--image", action="append", default=[], help="an image; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    # Options may stand between the run and the questions.
    return parser.parse_intermixed_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.chat import ChatSession
    from covft.checkpoints import load_run

    run = load_run(args.run, device=args.device)
    session = ChatSession(run.model, run.spec, args.image, resize=run.resize)
    for question in args.question:
        print(f"> {question}")
        print(session.ask(question, max_new_tokens=args.max_new_tokens), flush=True)
    if args.question:
        return
    print("An empty line ends the conversation.")
    while question := input("> ").strip():
        print(session.ask(question, max_new_tokens=args.max_new_tokens), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
    except EOFError:
        print()
