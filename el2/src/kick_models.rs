//! Every interleaving of a vCPU's run with kicks.
//!
//! The protocol is the real one. Around it stand what it orders: one word for a vCPU's interrupts, as
//! [`crate::vgic`] has it before its lock, and for each core whether EL2's SGI is pending. Threads stop where
//! a core would wait for an interrupt; what happens then is done after all of them, in one order.

use loom::sync::Arc;
use loom::thread;

use super::*;

/// Cores: the one that runs guests, and one where the vCPU ran before.
const CORE: u32 = 0;
const OTHER: u32 = 1;

/// A vCPU's interrupts: whether they have changed.
struct Interrupts(AtomicBool);

impl Interrupts {
    fn change(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn look(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

struct Vcpu {
    place: Whereabouts,
    interrupts: Interrupts,
}

/// A core's interface of the interrupt controller.
struct Core {
    sgi: AtomicBool,
    host: HostKick,
    /// GICv2: the core has said which bit its interface has.
    is_known: AtomicBool,
}

impl Core {
    /// As the controller does: a write behind a barrier.
    fn interrupt(&self) {
        fence(Ordering::SeqCst);
        if self.is_known.load(Ordering::Relaxed) {
            self.sgi.swap(true, Ordering::Release);
        }
    }

    /// Exchanges and no loads here: a controller's state has one order, also for who only looks.
    fn is_interrupted(&self) -> bool {
        self.sgi.fetch_or(false, Ordering::Acquire)
    }

    fn withdraw(&self) -> bool {
        let pending = self.sgi.swap(false, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        pending
    }
}

/// What a guest's exit for an interrupt comes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Next {
    Refresh,
    Leave,
}

/// As `exits::interrupt`: `more_urgent` says that a device's interrupt is what EL2 sees.
fn interrupt(core: &Core, more_urgent: bool) -> Next {
    if !more_urgent && core.withdraw() {
        if !core.host.take() {
            return Next::Refresh;
        }
        core.interrupt();
    }
    Next::Leave
}

struct World {
    vcpus: [Vcpu; 2],
    cores: [Core; 2],
}

impl World {
    fn new() -> Arc<Self> {
        let vcpu = || Vcpu {
            place: Whereabouts::new(),
            interrupts: Interrupts(AtomicBool::new(false)),
        };
        let core = || Core {
            sgi: AtomicBool::new(false),
            host: HostKick::new(),
            is_known: AtomicBool::new(false),
        };
        Arc::new(Self {
            vcpus: [vcpu(), vcpu()],
            cores: [core(), core()],
        })
    }

    fn vcpu(&self, vcpu: usize) -> &Vcpu {
        &self.vcpus[vcpu]
    }

    fn core(&self, core: u32) -> &Core {
        &self.cores[core as usize]
    }

    /// As `Vcpu::run` before the guest.
    fn enter(&self, vcpu: usize, core: u32) {
        self.core(core).is_known.store(true, Ordering::Relaxed);
        self.vcpu(vcpu).place.enter(core);
    }

    /// As `Vcpu::kick`, of someone who has a change for a vCPU and is on no core that runs one.
    fn kick(&self, vcpu: usize) {
        self.vcpu(vcpu).interrupts.change();
        match self.vcpu(vcpu).place.kick(None) {
            Kick::Nobody => {}
            Kick::Guest(cpu) => self.core(cpu).interrupt(),
            Kick::Host(cpu) => {
                self.core(cpu).host.announce();
                self.core(cpu).interrupt();
            }
        }
    }

    /// The host of this core takes what is pending, and looks after the vCPUs that it lets sleep.
    fn host_sees(&self, core: u32, sleeper: usize) -> bool {
        self.core(core).withdraw() && self.vcpu(sleeper).interrupts.look()
    }
}

fn kicker(world: &Arc<World>, vcpu: usize) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || world.kick(vcpu))
}

/// A vCPU goes into its guest, for the first time or from another core, or waits at EL2: it has seen the
/// change, or is fetched.
#[test]
fn a_guest_is_not_entered_behind_a_change() {
    for ran_before in [false, true] {
        loom::model(move || {
            let world = World::new();
            if ran_before {
                world.enter(0, OTHER);
                world.vcpu(0).place.leave();
            }
            let kicker = kicker(&world, 0);
            world.enter(0, CORE);
            let seen = world.vcpu(0).interrupts.look();
            kicker.join().unwrap();
            assert!(seen || world.core(CORE).withdraw(), "the guest runs on");
        });
    }
}

/// A vCPU leaves its guest to sleep in the host, which runs another one there before it takes interrupts:
/// the first has seen the change, or the host hears of it.
#[test]
fn a_vcpu_does_not_fall_asleep_behind_a_change() {
    loom::model(|| {
        let world = World::new();
        world.enter(0, OTHER);
        world.vcpu(0).place.leave();
        let kicker = kicker(&world, 0);
        world.enter(0, CORE);
        let mut awake = world.vcpu(0).interrupts.look();
        world.vcpu(0).place.leave();
        awake |= world.vcpu(0).interrupts.look();
        kicker.join().unwrap();
        world.enter(1, CORE);
        while world.core(CORE).is_interrupted() {
            awake |= interrupt(world.core(CORE), false) == Next::Leave && world.host_sees(CORE, 0);
        }
        assert!(awake, "it sleeps on");
    });
}

/// On one core vCPU 0 sleeps, of which the host has to hear, while vCPU 1 is in its guest, leaves it for a
/// device's interrupt, and comes back.
#[test]
fn the_hosts_kick_does_not_end_with_another_vcpu() {
    loom::model(|| {
        let world = World::new();
        world.enter(0, CORE);
        world.vcpu(0).place.leave();
        world.enter(1, CORE);
        let kicker = kicker(&world, 0);
        assert_eq!(interrupt(world.core(CORE), true), Next::Leave);
        let mut awake = world.host_sees(CORE, 0);
        world.enter(1, CORE);
        kicker.join().unwrap();
        if world.core(CORE).is_interrupted() {
            let next = interrupt(world.core(CORE), false);
            awake |= next == Next::Leave && world.host_sees(CORE, 0);
        }
        assert!(awake, "the host does not hear of it");
    });
}

/// One kick is for the host, the other for the guest, and both are the same SGI.
#[test]
fn two_kicks_of_one_core_both_arrive() {
    loom::model(|| {
        let world = World::new();
        world.enter(0, CORE);
        world.vcpu(0).place.leave();
        world.enter(1, CORE);
        let kickers = [kicker(&world, 0), kicker(&world, 1)];
        let (mut awake, mut seen) = (false, false);
        let mut step = || {
            if !world.core(CORE).is_interrupted() {
                return false;
            }
            awake |= interrupt(world.core(CORE), false) == Next::Leave && world.host_sees(CORE, 0);
            seen |= world.vcpu(1).interrupts.look();
            true
        };
        step();
        kickers.map(|kicker| kicker.join().unwrap());
        while step() {}
        assert!(awake, "the host does not hear of its vCPU");
        assert!(seen, "the guest runs on");
    });
}
