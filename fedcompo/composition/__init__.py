"""One model of many task vectors, exactly: integer sums, the joint head, folders for timm."""
