//! Arm stage-2 and EPT page tables whose maintenance order is tested.
