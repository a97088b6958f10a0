//! What QEMU's SMMU did, from its trace: which device's access went to which address under which VMID, and from which
//! root the tables were walked.
//!
//! QEMU does one access after the other, so the lines of one are together: the look-up in the TLB, which names the VMID;
//! if that missed, the steps of the walk from the root on; then the translation, which names the stream.

use std::collections::{BTreeMap, BTreeSet};

/// Arguments with which QEMU writes the lines that [`Trace::parse`] reads to a file.
#[must_use]
pub fn args(file: &str) -> Vec<String> {
    let mut args = vec!["-D".to_owned(), file.to_owned()];
    for event in [
        "smmu_iotlb_lookup_hit",
        "smmu_iotlb_lookup_miss",
        "smmu_ptw_level",
        "smmuv3_translate_success",
        "smmuv3_translate_bypass",
        "smmuv3_translate_disable",
    ] {
        args.extend(["-trace".to_owned(), event.to_owned()]);
    }
    args
}

/// Everything that was translated.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Translations of each stream under each VMID.
    pub translations: BTreeMap<(u32, u16), Span>,
    /// Root tables from which each VMID was walked.
    pub roots: BTreeMap<u16, BTreeSet<u64>>,
    /// Accesses that nothing was translated for, of a stream each.
    pub untranslated: BTreeMap<u32, usize>,
}

/// Some translations: how many, from the lowest to the highest input address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// How many.
    pub count: usize,
    /// Lowest address.
    pub lowest: u64,
    /// Highest address.
    pub highest: u64,
}

impl Trace {
    /// Reads QEMU's lines; others are skipped.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut trace = Self::default();
        let mut vmid = None;
        let mut root = None;
        for line in text.lines() {
            if line.starts_with("smmu_iotlb_lookup_") {
                vmid = number(line, "vmid=").and_then(|vmid| u16::try_from(vmid).ok());
                root = None;
            } else if line.starts_with("smmu_ptw_level") {
                root = root.or_else(|| number(line, "baseaddr="));
            } else if line.starts_with("smmuv3_translate_success") {
                trace.translation(line, vmid.take(), root.take());
            } else if line.starts_with("smmuv3_translate_bypass")
                || line.starts_with("smmuv3_translate_disable")
            {
                let stream = number(line, "sid=").and_then(|sid| u32::try_from(sid).ok());
                *trace
                    .untranslated
                    .entry(stream.unwrap_or(u32::MAX))
                    .or_default() += 1;
            }
        }
        trace
    }

    fn translation(&mut self, line: &str, vmid: Option<u16>, root: Option<u64>) {
        let stream = number(line, "sid=").and_then(|sid| u32::try_from(sid).ok());
        let (Some(stream), Some(address), Some(vmid)) = (stream, number(line, "iova="), vmid)
        else {
            return;
        };
        let span = self.translations.entry((stream, vmid)).or_insert(Span {
            count: 0,
            lowest: address,
            highest: address,
        });
        span.count += 1;
        span.lowest = span.lowest.min(address);
        span.highest = span.highest.max(address);
        if let Some(root) = root {
            self.roots.entry(vmid).or_default().insert(root);
        }
    }
}

/// The number behind this word: hexadecimal if it begins so.
fn number(line: &str, word: &str) -> Option<u64> {
    let (_, behind) = line.split_once(word)?;
    let end = behind.find(|c: char| !c.is_ascii_alphanumeric());
    let digits = &behind[..end.unwrap_or(behind.len())];
    match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => digits.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_an_access_belong_together() {
        let trace = Trace::parse(
            "smmuv3_translate_disable smmuv3-iommu-memory-region-8-1 sid=0x8 bypass (smmu disabled) iova:0x7e400000 is_write=1\n\
             smmu_iotlb_lookup_miss IOTLB cache MISS asid=-1 vmid=3 addr=0x40800000 hit=1 miss=2 hit rate=33\n\
             smmu_ptw_level stage=2 level=1 iova=0x40800000 subpage_sz=0x40000000 baseaddr=0x7e000000 offset=1 => pte=0x7e001003\n\
             smmu_ptw_level stage=2 level=2 iova=0x40800000 subpage_sz=0x200000 baseaddr=0x7e001000 offset=4 => pte=0x7d0007fd\n\
             smmuv3_translate_success smmuv3-iommu-memory-region-8-1 sid=0x8 iova=0x40800000 translated=0x7d000000 perm=0x3 stage=2\n\
             smmu_iotlb_lookup_hit IOTLB cache HIT asid=-1 vmid=3 addr=0x40800400 hit=2 miss=2 hit rate=50\n\
             smmuv3_translate_success smmuv3-iommu-memory-region-8-1 sid=0x8 iova=0x40800400 translated=0x7d000400 perm=0x3 stage=2\n\
             some other line\n",
        );
        let span = Span {
            count: 2,
            lowest: 0x4080_0000,
            highest: 0x4080_0400,
        };
        assert_eq!(trace.translations, [((8, 3), span)].into());
        assert_eq!(trace.roots, [(3, [0x7e00_0000].into())].into());
        assert_eq!(trace.untranslated, [(8, 1)].into());
    }

    #[test]
    fn a_refused_access_lends_its_root_to_nobody() {
        let trace = Trace::parse(
            "smmu_iotlb_lookup_miss IOTLB cache MISS asid=-1 vmid=1 addr=0x0 hit=1 miss=2 hit rate=33\n\
             smmu_ptw_level stage=2 level=1 iova=0x0 subpage_sz=0x40000000 baseaddr=0x1000 offset=1 => pte=0x0\n\
             smmu_iotlb_lookup_hit IOTLB cache HIT asid=-1 vmid=0 addr=0x5000 hit=2 miss=2 hit rate=50\n\
             smmuv3_translate_success smmuv3-iommu-memory-region-8-1 sid=0x10 iova=0x5000 translated=0x5000 perm=0x3 stage=2\n",
        );
        assert_eq!(trace.roots, BTreeMap::new());
        assert!(trace.translations.contains_key(&(0x10, 0)));
    }
}
