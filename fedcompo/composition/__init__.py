"""One model of many task vectors: sums in fixed point, the joint head, folders for timm.

The sums are exact: to take a client out gives the same bits as to never have added it.
"""
