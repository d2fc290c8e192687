"""Ask a trained model about images: questions given here, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from covft.chat import ChatSession

HELP = """\
/image PATH   the next question is about this image, too; may be repeated
/reset        forget the conversation and its images
/quit         end; so does an empty line
Ctrl-C stops an answer; it and its question are forgotten."""


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run (its --work-dir)")
    parser.add_argument("question", nargs="*", help="questions, asked in turn; none: type them")
    parser.add_argument("--image", action="append", default=[], help="an image; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--context",
        choices=["pinned", "refreshed"],
        default="pinned",
        help="what context-aware encoders read: the first question, or each question",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens only")
    parser.add_argument("--seed", type=int, help="repeat the same draws")
    # Options may stand between the run and the questions.
    args = parser.parse_intermixed_args()
    if not args.temperature and (args.top_p is not None or args.seed is not None):
        parser.error("--top-p and --seed would be ignored without --temperature")
    return args


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.chat import ChatSession
    from covft.checkpoints import load_run
    from covft.images import load_image
    from covft.models.sampling import Sampling

    images = [load_image(path) for path in args.image]  # before the model, which takes longer
    sampling = None
    if args.temperature:
        sampling = Sampling(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed)
    run = load_run(args.run, device=args.device)
    session = ChatSession.of(run, images, context=args.context, sampling=sampling)
    for question in args.question:
        print(f"> {question}")
        answer(session, question, args.max_new_tokens)
    if not args.question:
        converse(session, args.max_new_tokens)


def answer(session: ChatSession, question: str, max_new_tokens: int) -> None:
    """Print an answer while it comes."""
    for piece in session.stream(question, max_new_tokens=max_new_tokens):
        print(piece, end="", flush=True)
    print()


def converse(session: ChatSession, max_new_tokens: int) -> None:
    """Read questions and commands from the terminal until the end; mistakes don't end it."""
    print(HELP)
    line = "/help"
    while line and line != "/quit":
        try:
            line = input("> ").strip()
            command, _, rest = line.partition(" ")
            if command == "/reset":
                session.reset()
            elif command == "/image":
                session.add_images([Path(rest.strip()).expanduser()])
                print(f"the next question is about {len(session.images)} image(s)")
            elif command.startswith("/") and line != "/quit":
                print(f"'{command}' is unknown\n{HELP}")
            elif line != "/quit" and line:
                answer(session, line, max_new_tokens)
        except KeyboardInterrupt:
            print("\n(stopped; the question is forgotten)")
        except ValueError as error:
            print(f"error: {error}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
    except (EOFError, KeyboardInterrupt):
        print()
