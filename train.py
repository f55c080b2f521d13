"""Entry point in a clone, the same as the installed command ``twoview``.

python train.py                                  SimCLR on the built-in digits, then the evaluation
python train.py method=moco data=cifar10         another method and data set
python train.py --help                           tasks, methods, data sets and examples
"""

from twoview.cli import main

if __name__ == "__main__":
    main()
