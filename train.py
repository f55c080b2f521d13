"""Entry point of a clone; the installed command ``twoview`` is the same thing.

python train.py                                  SimCLR on the built-in digits, then the evaluation
python train.py method=simclr data=cifar10       another data set
python train.py --help                           tasks, methods, data sets and examples
"""

from twoview.cli import main

if __name__ == "__main__":
    main()
